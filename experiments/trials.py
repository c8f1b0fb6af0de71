"""The soups and splits of the comparison: what is reported, and what defaults are developed on.

Development never sees what is reported: other seeds and other members throughout, and for SST-2 and CIFAR-10, whose
reported splits all come from one pool of rows, a third of that pool is kept for development alone. There `test` is a
part of the held-out data that nothing learns or selects on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

import twa_merge as twa
from twa_merge.assembly import make_task
from twa_merge.recipe import DataConfig, Recipe
from twa_merge.tasks import Task

BLOCKS = 600
"""Blocks of 128 tokens held out, and tested on, for WikiText-2."""


@dataclass
class Trial:
    """One soup with one split of the data."""

    name: str
    checkpoints: list[Path]
    task: Task
    held_out: Any
    test: Any
    seed: int
    module: Any = None
    ordered: bool = False


def digits(args: argparse.Namespace) -> Iterator[Trial]:
    """Yield the demo's soups, one for each seed; in development a quarter of the held-out digits tests."""
    from twa_merge import demo

    for seed in range(100, 120) if args.development else range(10):
        folder = args.soups / f"digits-{seed}"
        if not folder.exists():
            demo.make_soup(folder, seed)
        recipe = demo.demo_recipe(folder, seed)
        task = make_task(recipe, twa.Soup(recipe.checkpoints))
        splits = demo._digits(seed)
        held_out = task.prepare(splits["validation"])
        if args.development:
            held_out, test = divided(held_out, 0.75, seed)
        else:
            test = task.prepare(splits["test"])
        yield Trial(f"digits-{seed}", [Path(c) for c in recipe.checkpoints], task, held_out, test, seed)


def sst2(args: argparse.Namespace) -> Iterator[Trial]:
    """Yield three splits of dev + test, for one soup: 718 held-out and 1,077 test sentences."""
    from datasets import concatenate_datasets, load_dataset

    folder = args.soups / ("minilm-101" if args.development else "minilm-1")
    files = {"dev": str(args.data / "sst2/dev.csv"), "test": str(args.data / "sst2/test.csv")}
    loaded = load_dataset("csv", data_files=files)
    checkpoints = sorted(folder.glob("member-*"))
    recipe = Recipe(checkpoints=list(map(str, checkpoints)), data=DataConfig(max_length=64))
    task = make_task(recipe, twa.Soup(checkpoints))
    rows = task.prepare(concatenate_datasets([loaded["dev"], loaded["test"]]))
    for seed, held_out, test in splits_of(rows, 0.4, args.development):
        yield Trial(f"sst2-{seed}", checkpoints, task, held_out, test, seed)


def cifar10(args: argparse.Namespace) -> Iterator[Trial]:
    """Yield three splits of test.parquet, for this network has seen every training picture: 1,666 pictures a side."""
    from soups.resnet20 import ResNet20, load_pictures

    folder = args.soups / ("resnet20-101" if args.development else "resnet20-1")
    checkpoints = sorted(folder.glob("member-*"))
    task = twa.module_task(torch.nn.functional.cross_entropy)
    x, y = load_pictures(args.data / "cifar10/test.parquet")
    for seed, held_out, test in splits_of(torch.utils.data.TensorDataset(x, y), 0.5, args.development):
        yield Trial(f"cifar10-{seed}", checkpoints, task, held_out, test, seed, ResNet20())


def wikitext(args: argparse.Namespace) -> Iterator[Trial]:
    """Yield ten snapshots of each run; the beginning of valid.txt is held out, that of test.txt tests."""
    from datasets import load_dataset

    files = {name: str(args.data / f"wikitext-2/{name}.txt") for name in ("valid", "test")}
    loaded = load_dataset("text", data_files=files)
    for seed in (101,) if args.development else (1, 2, 3):
        checkpoints = sorted((args.soups / f"gpt2-{seed}").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
        recipe = Recipe(checkpoints=list(map(str, checkpoints)), data=DataConfig(max_length=128))
        task = make_task(recipe, twa.Soup(checkpoints))
        valid = task.prepare(loaded["valid"])
        if args.development:  # other blocks of valid.txt, none of test.txt
            held_out, test = Subset(valid, range(BLOCKS, 2 * BLOCKS)), Subset(valid, range(2 * BLOCKS, 3 * BLOCKS))
        else:
            held_out, test = Subset(valid, range(BLOCKS)), Subset(task.prepare(loaded["test"]), range(BLOCKS))
        yield Trial(f"wikitext-{seed}", checkpoints, task, held_out, test, seed, ordered=True)


KINDS = {"digits": digits, "sst2": sst2, "cifar10": cifar10, "wikitext": wikitext}


def splits_of(rows: Any, share: float, development: bool) -> Iterator[tuple[int, Any, Any]]:
    """Yield seeds and (held-out, test) splits of a pool of rows, whose first third is for development alone."""
    order = np.random.default_rng(2026).permutation(len(rows)).tolist()
    reserved = len(order) // 3
    pool = order[:reserved] if development else order[reserved:]
    for seed in (100, 101) if development else (0, 1, 2):
        yield seed, *divided(Subset(rows, pool), 0.75 if development else share, seed)


def divided(rows: Any, share: float, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """Return a random `share` of the rows, and the rest."""
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    cut = round(share * len(order))
    return Subset(rows, order[:cut]), Subset(rows, order[cut:])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every experiment takes."""
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--data", type=Path, help="folder of the public data sets")
    parser.add_argument("--soups", type=Path, required=True, help="what experiments/soups/*.py made")
    parser.add_argument("--output", type=Path, required=True, help="JSON; trials that it holds are not run again")
