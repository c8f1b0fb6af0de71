"""What the soup makers share: arguments, hyper-parameters drawn in advance, members that appear when complete."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def arguments(about: str | None, members: int) -> argparse.Namespace:
    """Return --data, --output, --seed and --members."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder of the soup")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--members", type=int, default=members)
    return parser.parse_args()


def missing_members(
    args: argparse.Namespace, draw: Callable[[np.random.Generator], dict[str, Any]]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield folder and hyper-parameters of each member that is not there yet."""
    generator = np.random.default_rng(args.seed)
    choices = [draw(generator) for _ in range(args.members)]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "soup.json").write_text(json.dumps(choices, indent=2) + "\n", encoding="utf-8")
    for k, choice in enumerate(choices):
        folder = args.output / f"member-{k:02d}"
        if folder.exists():
            continue
        start = time.perf_counter()
        yield folder, choice
        print(f"{folder.name}: {time.perf_counter() - start:.0f} s {choice}", flush=True)
    shutil.rmtree(args.output / "trainer", ignore_errors=True)


@contextlib.contextmanager
def published(folder: Path) -> Iterator[Path]:
    """Yield a folder that becomes `folder` when the block is done."""
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    unfinished.rename(folder)
