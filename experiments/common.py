"""What the experiments share: arguments, one JSON of all seeds that grows, means and spreads."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DEVELOPMENT = 100
"""Seeds from here on are for choosing settings, and never see test data."""


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


def against(reference: str, **columns: str) -> Callable[[Found], str]:
    """Return what makes a Markdown table of all seeds: a row for each candidate, means over seeds.

    Args:
        reference: the candidate that others are compared with, paired, in the first column.
        columns: key of a score -> heading.
    """
    first, *others = columns

    def table(found: Found) -> str:
        headings = [columns[first], f"against {reference}", *(columns[key] for key in others)]
        rows = [f"| | {' | '.join(headings)} |", "|---|" + "--:|" * len(headings)]
        known = [seed[reference][first] for seed in found]
        for name in (name for name, value in found[0].items() if isinstance(value, dict)):
            of = {key: [seed[name][key] for seed in found] for key in columns}
            cells = [mean_sd(of[first]), paired(of[first], known), *(mean_sd(of[key]) for key in others)]
            rows.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(rows)

    return table


def less(found: Found, key: str, reference: str) -> dict[str, list[float]]:
    """Return every candidate's score less that of the reference, for each seed."""
    names = [name for name, value in found[0].items() if isinstance(value, dict) and name != reference]
    return {name: [seed[name][key] - seed[reference][key] for seed in found] for name in names}


def plot_differences(
    series: dict[str, dict[str, list[float]]], label: str, path: Path, *, linear_within: float | None = None
) -> None:
    """Draw differences, means over seeds and their standard errors, one line for each name.

    Args:
        series: its name in the legend -> name of the line -> one value for each seed.
        label: of the axis.
        path: PNG.
        linear_within: draw what is beyond this on a logarithmic scale.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(next(iter(series.values())))
    figure, axes = plt.subplots(figsize=(7, 1 + 0.28 * len(names)))
    for k, (title, values) in enumerate(series.items()):
        places = np.arange(len(names)) + 0.15 * (2 * k - len(series) + 1)
        seeds = len(values[names[0]])
        means = [np.mean(values[name]) for name in names]
        errors = [np.std(values[name], ddof=1) / seeds**0.5 if seeds > 1 else 0.0 for name in names]
        axes.errorbar(means, places, xerr=errors, fmt="o", ms=4, capsize=2, color=f"C{k}", label=title)
    axes.axvline(0, color="0.5", lw=1, ls="--")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    if linear_within is not None:
        axes.set_xscale("symlog", linthresh=linear_within)
    if len(series) > 1:
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def for_each_seed(args: argparse.Namespace, name: str, run: Callable[[int], dict[str, Any]]) -> Found:
    """Return what every seed found; seeds in the JSON are not run again."""
    file = args.output / f"{name}.json"

    def known() -> dict[str, Any]:
        return dict(json.loads(file.read_text())) if file.is_file() else {}

    for seed in args.seeds:
        if str(seed) in known():
            continue
        start = time.perf_counter()
        found = run(seed) | {"seconds": time.perf_counter() - start}
        args.output.mkdir(parents=True, exist_ok=True)
        # read anew: other seeds may run beside this one
        file.write_text(json.dumps(known() | {str(seed): found}, indent=1) + "\n")
    everything = known()
    return [everything[str(seed)] for seed in args.seeds]


def mean_sd(values: list[float]) -> str:
    """Return mean ± standard deviation over seeds."""
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1) if len(values) > 1 else float('nan'):.4f}"


def paired(a: list[float], b: list[float]) -> str:
    """Return the mean difference a - b over seeds and its standard error."""
    differences = np.subtract(a, b)
    error = np.std(differences, ddof=1) / np.sqrt(len(differences)) if len(differences) > 1 else float("nan")
    return f"{np.mean(differences):+.4f} ± {error:.4f}"
