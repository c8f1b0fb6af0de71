"""Every candidate on one soup: baselines, TWA at three granularities, and the rival, fine-tuning on the same data.

    python experiments/compare.py digits   --output results/digits.json
    python experiments/compare.py sst2     --data DATA --soups SOUPS --output results/sst2.json
    python experiments/compare.py cifar10  --data DATA --soups SOUPS --output results/cifar10.json
    python experiments/compare.py wikitext --data DATA --soups SOUPS --output results/wikitext.json

DATA is a folder of public data sets, SOUPS holds what `experiments/soups/*.py` made. Learning uses the defaults and
nothing else; `--development` takes the development soups, prints select losses only, and `--set key=value` tries other
settings on them. Test splits are scored once, at the end of each run.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from torch.utils.data import DataLoader, Subset

import twa_merge as twa
from twa_merge.assembly import make_task
from twa_merge.data import split_indices
from twa_merge.evaluation import Evaluation, evaluate, paired_difference
from twa_merge.job import Job
from twa_merge.recipe import DataConfig, Recipe
from twa_merge.tasks import Task
from twa_merge.training import LearnConfig

GRANULARITIES = ("model", "layer", "tensor")
RIVAL_LRS = (1e-5, 1e-4, 1e-3)
RIVAL_STEPS = 45
"""At least so many steps, and at least two epochs; every epoch is scored."""
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
    """Yield the demo's soups, one for each seed."""
    from twa_merge import demo

    for seed in range(100, 103) if args.development else range(10):
        folder = args.soups / f"digits-{seed}"
        if not folder.exists():
            demo.make_soup(folder, seed)
        recipe = demo.demo_recipe(folder, seed)
        soup = twa.Soup(recipe.checkpoints)
        task = make_task(recipe, soup)
        splits = demo._digits(seed)
        yield Trial(
            f"digits-{seed}", [Path(c) for c in recipe.checkpoints], task,
            task.prepare(splits["validation"]),
            None if args.development else task.prepare(splits["test"]), seed,
        )  # fmt: skip


def sst2(args: argparse.Namespace) -> Iterator[Trial]:
    """Yield three splits of dev + test into 872 held-out and 1,821 test sentences, for one soup."""
    from datasets import concatenate_datasets, load_dataset

    folder = args.soups / ("minilm-101" if args.development else "minilm-1")
    files = {"dev": str(args.data / "sst2/dev.csv"), "test": str(args.data / "sst2/test.csv")}
    loaded = load_dataset("csv", data_files=files)
    checkpoints = sorted(folder.glob("member-*"))
    recipe = Recipe(checkpoints=list(map(str, checkpoints)), data=DataConfig(max_length=64))
    task = make_task(recipe, twa.Soup(checkpoints))
    if args.development:  # the reported test rows stay unseen
        rows = task.prepare(loaded["dev"])
        for seed in (100,):
            yield Trial(f"sst2-{seed}", checkpoints, task, rows, None, seed)
        return
    rows = task.prepare(concatenate_datasets([loaded["dev"], loaded["test"]]))
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(rows)).tolist()
        yield Trial(f"sst2-{seed}", checkpoints, task, Subset(rows, order[:872]), Subset(rows, order[872:]), seed)


def cifar10(args: argparse.Namespace) -> Iterator[Trial]:
    """Yield three splits of test.parquet into halves: this network has seen every training picture."""
    from soups.resnet20 import ResNet20, load_pictures

    folder = args.soups / ("resnet20-101" if args.development else "resnet20-1")
    checkpoints = sorted(folder.glob("member-*"))
    task = twa.module_task(torch.nn.functional.cross_entropy)
    x, y = load_pictures(args.data / "cifar10/test.parquet")
    rows = torch.utils.data.TensorDataset(x, y)
    for seed in (100,) if args.development else range(3):
        order = np.random.default_rng(seed).permutation(len(rows)).tolist()
        half = len(rows) // 2
        held_out, test = Subset(rows, order[:half]), Subset(rows, order[half:])
        yield Trial(
            f"cifar10-{seed}", checkpoints, task, held_out, None if args.development else test, seed, ResNet20()
        )


def wikitext(args: argparse.Namespace) -> Iterator[Trial]:
    """Yield ten snapshots of each run; valid.txt is held out, test.txt tests."""
    from datasets import load_dataset

    files = {name: str(args.data / f"wikitext-2/{name}.txt") for name in ("valid", "test")}
    loaded = load_dataset("text", data_files=files)
    for seed in (101,) if args.development else (1, 2, 3):
        checkpoints = sorted((args.soups / f"gpt2-{seed}").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
        recipe = Recipe(checkpoints=list(map(str, checkpoints)), data=DataConfig(max_length=128))
        task = make_task(recipe, twa.Soup(checkpoints))
        test = None if args.development else first_blocks(task.prepare(loaded["test"]))
        held_out = first_blocks(task.prepare(loaded["valid"]))
        yield Trial(f"wikitext-{seed}", checkpoints, task, held_out, test, seed, ordered=True)


def first_blocks(rows: Any) -> Any:
    """Return the first `BLOCKS` of a language modelling split."""
    return Subset(rows, range(min(BLOCKS, len(rows))))


class SharedJob(Job):
    """A run that takes what an earlier run on the same soup and data has scored: baselines do not depend on groups."""

    scored: ClassVar[dict[bytes, Evaluation]] = {}
    tested: ClassVar[dict[str, Evaluation]] = {}

    def make_scorer(self) -> Any:
        scorer = super().make_scorer()
        scorer._cache = self.scored
        return scorer

    def score_test(self, candidates: list[Any]) -> None:
        for candidate in candidates:
            if candidate.name not in self.tested:
                self.tested[candidate.name] = self.scorer.on(candidate.weights, self.test)
            candidate.test = self.tested[candidate.name]


def run_trial(trial: Trial, overrides: dict[str, Any], *, rivals: bool) -> dict[str, Any]:
    """Return scores of every candidate, and per-sample test losses for pooled statistics."""
    soup = twa.Soup(trial.checkpoints)
    SharedJob.scored, SharedJob.tested = {}, {}
    tested: dict[str, Evaluation] = {}
    rows: dict[str, dict[str, Any]] = {}
    for granularity in GRANULARITIES:
        learn = replace(LearnConfig(), seed=trial.seed, granularity=granularity, **overrides)
        splits = {"held_out": trial.held_out, "test": trial.test}
        recipe = Recipe(learn=learn, ordered=trial.ordered)
        result = SharedJob(recipe, soup, splits, task=trial.task, module=copy.deepcopy(trial.module)).run()
        for candidate in result.league:
            if candidate.name not in rows:  # asked again, baselines are scored from memory and cost no pass
                rows[candidate.name] = account(candidate.select, candidate.test) | {"passes": candidate.passes}
            if candidate.test is not None:
                tested[candidate.name] = candidate.test
        learned = next(c for c in result.league if c.learned)
        rows[learned.name] |= {"shipped": result.verdict.winner.name, "seconds": sum(result.seconds.values())}
        rows[learned.name]["best_step"] = result.best_step
        if learned.test is not None:
            best = min(
                (c for c in result.league if not c.learned and not c.optimistic), key=lambda c: c.select.loss.value
            )
            gap = paired_difference(result.verdict.winner.test, best.test)
            rows[learned.name]["shipped_minus_best_baseline"] = [gap.value, gap.standard_error]
    if rivals and trial.test is not None:
        for name in ("best single", "greedy"):
            weights = next(c.weights for c in result.league if c.name == name)
            rival = fine_tune(trial, soup, weights)
            rows[f"{name}, fine-tuned"] = account(None, rival)
            tested[f"{name}, fine-tuned"] = rival
    for name, evaluation in tested.items():
        for other in ("uniform", "greedy", "best single"):
            gap = paired_difference(evaluation, tested[other])
            rows[name][f"minus {other}"] = [gap.value, gap.standard_error]
    return rows


def account(select: Evaluation | None, test: Evaluation | None) -> dict[str, Any]:
    """Return losses and metrics with standard errors."""
    found = {}
    for part, evaluation in (("select", select), ("test", test)):
        if evaluation is None:
            continue
        found[part] = {"loss": [evaluation.loss.value, evaluation.loss.standard_error]}
        for metric in evaluation.metrics:
            score = evaluation.metric(metric.name)
            found[part][metric.name] = [score.value, score.standard_error]
    return found


def fine_tune(trial: Trial, soup: twa.Soup, weights: twa.MixingWeights) -> Evaluation:
    """Return the test evaluation of a merge fine-tuned on the fit part; lr and epoch are chosen on the select part."""
    merged = twa.merged_model(soup, copy.deepcopy(trial.module), granularity="model")
    module = merged.merge_and_unload() if weights is None else materialise(merged, soup, weights)
    fit, select = split_indices(len(trial.held_out), min_select=1, seed=trial.seed)[0]
    best, best_loss = copy.deepcopy(module), np.inf
    for lr in RIVAL_LRS:
        tuned = copy.deepcopy(module)
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr)
        torch.manual_seed(trial.seed)
        loader = DataLoader(Subset(trial.held_out, fit), batch_size=32, shuffle=True, collate_fn=trial.task.collate)
        for _ in range(max(2, -(-RIVAL_STEPS // len(loader)))):
            tuned.train()
            for batch in loader:
                losses, counts = trial.task.sample_losses(trial.task.forward(tuned, batch), batch)
                ((losses * counts).sum() / counts.sum()).backward()
                torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            loss = evaluate(tuned, Subset(trial.held_out, select), trial.task, batch_size=64).loss.value
            if loss < best_loss:
                best, best_loss = copy.deepcopy(tuned), loss
    return evaluate(best, trial.test, trial.task, batch_size=64)


def materialise(merged: twa.MergedModel, soup: twa.Soup, weights: twa.MixingWeights) -> torch.nn.Module:
    """Return the plain module with a merge in place, a single checkpoint's buffers included."""
    merged.start_from(weights)
    module = merged.merge_and_unload()
    only = weights.one_hot_column() or 0
    state = {n: soup.read(only, n) for n, _ in module.named_buffers() if soup.tensor_of(n) is not None}
    if weights.statistics:
        state |= dict(weights.statistics)
    module.load_state_dict(state, strict=False)
    return module


def main() -> None:
    """Run the trials and write one JSON with a row for each candidate and trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {"digits": digits, "sst2": sst2, "cifar10": cifar10, "wikitext": wikitext}
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--soups", type=Path, default=Path(tempfile.gettempdir()) / "twa-merge-soups")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--development", action="store_true")
    parser.add_argument("--no-rivals", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="key=value")
    args = parser.parse_args()
    overrides = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in args.set)}
    found: dict[str, Any] = {"overrides": overrides, "trials": {}}
    for trial in kinds[args.kind](args):
        rows = run_trial(trial, overrides, rivals=not args.no_rivals)
        found["trials"][trial.name] = rows
        for name, row in rows.items():
            parts = {part: f"{row[part]['loss'][0]:.4f}" for part in ("select", "test") if part in row}
            print(trial.name, f"{name:24s}", parts, row.get("best_step", ""), flush=True)
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
