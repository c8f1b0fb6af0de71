"""What the experiments share: arguments, one JSON of all seeds that grows, means and spreads."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def arguments(about: str | None, *, seeds: tuple[int, ...] = (0, 1, 2)) -> argparse.ArgumentParser:
    """Return a parser of --data, --output and --seeds."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the public data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder of runs, JSON, table and plot")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    return parser


Found = list[dict[str, Any]]


def report(
    args: argparse.Namespace, name: str, run: Callable[[int], dict[str, Any]], table: Callable[[Found], str]
) -> Found:
    """Run every seed, write and print the table, and return what was found."""
    found = for_each_seed(args, name, run)
    text = table(found)
    (args.output / f"{name}.md").write_text(text + "\n")
    print(text)
    return found


def for_each_seed(args: argparse.Namespace, name: str, run: Callable[[int], dict[str, Any]]) -> Found:
    """Return what every seed found; seeds in the JSON are not run again."""
    file = args.output / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for seed in args.seeds:
        if str(seed) in found:
            continue
        start = time.perf_counter()
        found[str(seed)] = run(seed) | {"seconds": time.perf_counter() - start}
        args.output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
    return [found[str(seed)] for seed in args.seeds]


def mean_sd(values: list[float]) -> str:
    """Return mean ± standard deviation over seeds."""
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1) if len(values) > 1 else float('nan'):.4f}"


def paired(a: list[float], b: list[float]) -> str:
    """Return the mean difference a - b over seeds and its standard error."""
    differences = np.subtract(a, b)
    error = np.std(differences, ddof=1) / np.sqrt(len(differences)) if len(differences) > 1 else float("nan")
    return f"{np.mean(differences):+.4f} ± {error:.4f}"
