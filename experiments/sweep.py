"""Settings compared on development soups, which share neither seeds nor members nor test rows with the reported ones.

    python experiments/sweep.py sst2 --data DATA --soups SOUPS --output sweeps/sst2.json \\
        --grid coordinates=relative lr=0.01,0.03,0.1 granularity=layer,tensor --grid coordinates=normalized lr=0.01
    python experiments/sweep.py --table sweeps/*.json

Each setting shows the mean gain of the learned merge over the best baseline on the select part, and on a part of the
held-out data that it neither learned nor was chosen on; and what would ship under several margins of the guard.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from compare import Scores, account, learn_merge, save
from trials import KINDS, add_arguments

import twa_merge as twa

MARGINS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def settings_of(grid: list[str]) -> list[dict[str, Any]]:
    """Return the product of `key=value,value` arguments."""
    keys, values = zip(*(text.split("=") for text in grid), strict=True)
    return [
        dict(zip(keys, map(yaml.safe_load, choice), strict=True))
        for choice in itertools.product(*(v.split(",") for v in values))
    ]


def table(files: list[str]) -> str:
    """Return a line for each soup and setting, then one for each margin."""
    lines, decisions = [], []
    for file in files:
        runs = json.loads(Path(file).read_text(encoding="utf-8"))["runs"]
        by_setting: dict[str, list[dict[str, Any]]] = {}
        for run in runs:
            by_setting.setdefault(" ".join(f"{k}={v}" for k, v in run["settings"].items()), []).append(run)
        for setting, group in by_setting.items():
            select = np.mean([run["select_gain"][0] for run in group])
            outer = np.array([-run["minus_best_baseline"][0] for run in group])
            error = outer.std(ddof=1) / len(outer) ** 0.5 if len(outer) > 1 else group[0]["minus_best_baseline"][1]
            steps = np.median([run["best_step"] for run in group])
            lines.append(
                f"| {Path(file).stem} ({len(group)}) | {setting} | {select:+.4f} | {outer.mean():+.4f} ± {error:.4f} "
                f"| {steps:.0f} of {max(run['last_step'] for run in group)} |"
            )
        decisions += [(Path(file).stem, run) for run in runs]
    lines.append("")
    for margin in MARGINS:
        shipped = [run for _, run in decisions if run["select_gain"][0] > margin * run["select_gain"][1]]
        gains = [-run["minus_best_baseline"][0] for run in shipped]
        worst = max((run["minus_best_baseline"][0] / run["minus_best_baseline"][1] for run in shipped), default=0.0)
        harmed = sum(run["minus_best_baseline"][0] > 2 * run["minus_best_baseline"][1] for run in shipped)
        lines.append(
            f"| {margin:g} | {len(shipped)} of {len(decisions)} | {sum(gains) / len(decisions):+.4f} "
            f"| {sum(g < 0 for g in gains)} | {harmed} | {worst:+.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the settings that the output does not hold yet, or print tables."""
    if sys.argv[1:2] == ["--table"]:
        print(table(sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--grid", action="append", nargs="+", required=True, metavar="key=value,value")
    parser.add_argument("--trials", type=int, help="the first so many")
    args = parser.parse_args()
    args.development = True
    found: dict[str, Any] = {"runs": []}
    if args.output.is_file():
        found = json.loads(args.output.read_text(encoding="utf-8"))
    for trial in itertools.islice(KINDS[args.kind](args), args.trials):
        soup, scores = twa.Soup(trial.checkpoints), Scores()
        for settings in itertools.chain.from_iterable(map(settings_of, args.grid)):
            if any(run["trial"] == trial.name and run["settings"] == settings for run in found["runs"]):
                continue
            run = {"trial": trial.name, "settings": settings, **account(learn_merge(trial, soup, scores, **settings))}
            found["runs"].append(run)
            print(run, flush=True)
            save(args.output, found)


if __name__ == "__main__":
    main()
