"""Fine-tuning soups that grow (paper, tables 5, 6 and 10): best, second best, uniform, greedy, TWA at N = 4, 8, 16.

    python experiments/growing_soup.py digits  --data DATA --output runs/growing
    python experiments/growing_soup.py cifar10 --data DATA --output runs/growing --soups SOUPS
    python experiments/growing_soup.py sst2    --data DATA --output runs/growing --soups SOUPS

`digits`: for each seed, a small ViT of its own, fine-tuned 16 times in ways a sweep would try. `cifar10`, `sst2`: one
soup of 16 members (`experiments/soups/*.py --members 16`); a seed divides the pictures or sentences and draws the order
of the members. The first N of an order are the soup of size N. Learning uses the defaults; test data are scored once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, mean_sd, paired, report
from trials import KINDS, Trial

import twa_merge as twa
from twa_merge.job import Job
from twa_merge.recipe import Recipe

SIZES = (4, 8, 16)
GRANULARITIES = {"TWA": "model", "TWA by layer": "layer", "TWA by tensor": "tensor"}


def trial(args: argparse.Namespace, seed: int) -> Trial:
    """Return the soup of 16, held-out and test data of a seed."""
    if args.kind == "digits":
        from twa_merge import demo
        from twa_merge.assembly import make_task

        folder = args.output / f"digits-{seed}"
        if not folder.exists():
            demo.make_soup(folder, seed, members=max(SIZES))
        checkpoints = [folder / f"members/member-{k}" for k in range(max(SIZES))]
        recipe = demo.demo_recipe(folder, seed)
        task = make_task(recipe, twa.Soup(checkpoints))
        splits = demo._digits(seed)
        found = Trial(
            "digits", checkpoints, task, task.prepare(splits["validation"]), task.prepare(splits["test"]), seed
        )
    else:
        args.development = False
        found = next(one for one in KINDS[args.kind](args) if one.seed == seed)
    order = np.random.default_rng(seed).permutation(len(found.checkpoints))
    found.checkpoints = [found.checkpoints[k] for k in order]
    return found


def each_member(one: Trial) -> list[dict[str, float]]:
    """Return every member's held-out loss, and its test loss and accuracy."""
    soup = twa.Soup(one.checkpoints)
    job = Job(Recipe(), soup, {"held_out": one.held_out, "test": one.test}, task=one.task, module=one.module)
    job.set_up()
    job.open_data(divide=False)
    job.build_model("disk")
    found = []
    for k in range(len(soup)):
        weights = twa.one_hot(k, soup.labels)
        test = job.scorer.on(weights, one.test)
        scores = {"loss": test.loss.value, "accuracy": test.metric("accuracy").value}
        found.append(scores | {"held out": job.scorer(weights).loss.value})
    job.model.unload()
    return found


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return test loss and accuracy of every candidate at every size."""
    one = trial(args, seed)
    members = each_member(one)
    found: dict[str, Any] = {}
    for size in SIZES:
        soup = twa.Soup(one.checkpoints[:size])
        found[f"second best, N = {size}"] = sorted(members[:size], key=lambda scores: scores["held out"])[1]
        for name, granularity in GRANULARITIES.items():
            result = twa.train(
                soup, one.held_out, task=one.task, module=one.module, test=one.test, granularity=granularity, seed=seed
            )
            for candidate in result.league:
                label = name if candidate.learned else candidate.name
                found[f"{label}, N = {size}"] = {
                    "loss": candidate.test.loss.value,
                    "accuracy": candidate.test.metric("accuracy").value,
                }
            if result.verdict.winner.learned:
                found[f"{name}, N = {size}"]["ships"] = True
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Return all seeds as Markdown, each candidate against the greedy soup of its size, and of the largest."""
    largest = [seed[f"greedy, N = {max(SIZES)}"]["loss"] for seed in found]
    rows = [
        f"| | test loss | against greedy of this N | against greedy of N = {max(SIZES)} | test accuracy | ships |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in (name for name, value in found[0].items() if isinstance(value, dict)):
        losses = [seed[name]["loss"] for seed in found]
        greedy = [seed[f"greedy, N = {name.rpartition(' ')[2]}"]["loss"] for seed in found]
        accuracy = mean_sd([seed[name]["accuracy"] for seed in found])
        ships = f"{sum(seed[name].get('ships', False) for seed in found)} of {len(found)}" if "TWA" in name else ""
        against = (paired(losses, greedy), paired(losses, largest))
        rows.append(f"| {name} | {mean_sd(losses)} | {' | '.join(against)} | {accuracy} | {ships} |")
    return "\n".join(rows)


def plot(found: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw test loss over the size of the soup, and its paired difference from the greedy soup's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))

    def losses(name: str) -> Any:
        return np.array([[seed[f"{name}, N = {size}"]["loss"] for size in SIZES] for seed in found])

    places = np.arange(len(SIZES))
    for k, name in enumerate(("best single", "uniform", "greedy", *GRANULARITIES)):
        style = "-o" if "TWA" in name else "--s"
        left.plot(places, losses(name).mean(axis=0), style, label=name, lw=1, ms=4, color=f"C{k}")
        if "TWA" in name:
            less = losses(name) - losses("greedy")
            error = less.std(axis=0, ddof=1) / len(found) ** 0.5 if len(found) > 1 else 0
            right.errorbar(places + 0.06 * (k - 4), less.mean(axis=0), error, fmt="o", capsize=2, ms=4, color=f"C{k}")
    right.axhline(0, color="0.5", lw=1, ls="--")
    left.set(ylabel="test loss, mean over seeds")
    right.set(ylabel="less greedy's, ± standard error (paired)")
    for axes in (left, right):
        axes.set_xticks(places, [str(size) for size in SIZES])
        axes.set(xlabel="checkpoints", title=title)
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run all seeds, print the table, draw the plot."""
    parser = arguments(__doc__)
    parser.add_argument("kind", choices=("digits", "cifar10", "sst2"))
    parser.add_argument("--soups", type=Path, help="what experiments/soups/*.py made")
    args = parser.parse_args()
    found = report(args, f"growing-{args.kind}", lambda seed: run(args, seed), table)
    plot(found, args.kind, args.output / f"growing-{args.kind}.png")


if __name__ == "__main__":
    main()
