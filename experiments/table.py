"""Print the tables of docs/results.md from the JSON files of compare.py.

python experiments/table.py results/digits.json results/sst2.json ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from twa_merge.recipe import Recipe


def interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean over trials."""
    generator = np.random.default_rng(0)
    means = values[generator.integers(0, len(values), (resamples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def table(trials: dict[str, dict[str, Any]]) -> str:
    """Return the mean over trials of each candidate, and its paired differences to greedy and uniform."""
    names = list(next(iter(trials.values())))
    metric = next((m for m in trials[next(iter(trials))][names[0]]["test"] if m != "loss"), None)
    lines = [
        f"| | test loss, mean (sd over trials) | test {metric} (se of a trial) | minus greedy [95 %] "
        "| minus uniform [95 %] | lower than greedy, uniform (by 2 paired se) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in names:
        rows = [trial[name] for trial in trials.values() if name in trial]
        losses = np.array([row["test"]["loss"][0] for row in rows])
        cells = [name, f"{losses.mean():.4f} ({losses.std(ddof=1) if len(losses) > 1 else float('nan'):.4f})"]
        scores = np.array([row["test"][metric] for row in rows]) if metric else np.zeros((1, 2))
        cells.append(f"{scores[:, 0].mean():.4f} ({scores[:, 1].mean():.4f})")
        for other in ("greedy", "uniform"):
            gaps = np.array([row[f"minus {other}"][0] for row in rows])
            low, high = interval(gaps)
            cells.append(f"{gaps.mean():+.4f} [{low:+.4f}, {high:+.4f}]")
        cells.append(", ".join(lower(rows, other) for other in ("greedy", "uniform")) + f" of {len(rows)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def lower(rows: list[dict[str, Any]], other: str) -> str:
    """Return in how many trials the loss is lower, and in how many by two paired standard errors."""
    gaps = [row[f"minus {other}"] for row in rows]
    return f"{sum(gap < 0 for gap, _ in gaps)} ({sum(gap < -2 * error for gap, error in gaps)})"


def shipped(trials: dict[str, dict[str, Any]]) -> str:
    """Return what the guard ships in each trial, and how it does on the test split against the best baseline."""
    lines = [
        "| | ships | best baseline | select gain | test loss of the learned merge minus the best baseline's |",
        "|---|---|---|---:|---:|",
    ]
    for name, trial in trials.items():
        for row_name, row in trial.items():
            if "select_gain" not in row:
                continue
            (gain, gain_error), (gap, error) = row["select_gain"], row["minus_best_baseline"]
            winner = row_name if gain > Recipe().margin * gain_error else row["best_baseline"]
            lines.append(
                f"| {name}, {row_name} | {winner} | {row['best_baseline']} | {gain:+.4f} ± {gain_error:.4f} "
                f"| {gap:+.4f} ({gap / error if error else 0:+.1f} paired se) |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    for path in parser.parse_args().results:
        found = json.loads(path.read_text(encoding="utf-8"))["trials"]
        print(f"## {path.stem}: {len(found)} trials\n\n{table(found)}\n\n{shipped(found)}\n")
