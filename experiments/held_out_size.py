"""How many held-out samples learning needs, with a row of weights for the whole model, each layer or each tensor.

    python experiments/held_out_size.py --data DATA --output runs/held-out-size

For each seed, a small VGG-like net (GroupNorm, so that few samples do not mean poor running statistics) is trained on
5,000 pictures of CIFAR-10 (JPEG) and fine-tuned eight times in ways a sweep would try, some of them bad. Weights are
learned on 50 to 2,000 other pictures, by the defaults, and greedy soups chosen on the same. Test pictures are scored
once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, mean_sd, paired, report
from nets import vgg
from safetensors.torch import save_file
from soups.resnet20 import draw, fine_tune, load_pictures
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import twa_merge as twa
from twa_merge.recipe import DataConfig, Recipe

TRAIN, MEMBERS = 5_000, 8
SIZES = (50, 100, 200, 500, 1000, 2000)
GRANULARITIES = {"TWA": "model", "TWA by layer": "layer", "TWA by tensor": "tensor"}


def make_net(width: int) -> nn.Module:
    """Return the net with fresh weights."""
    return vgg(width, lambda channels: nn.GroupNorm(4, channels))


def make_soup(folder: Path, x: torch.Tensor, y: torch.Tensor, width: int, seed: int) -> list[Path]:
    """Return members that are fine-tuned from one net."""
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    base = make_net(width)
    common = {"batch": 64, "weight_decay": 5e-4, "label_smoothing": 0.0, "augment": True, "share": 1.0}
    fine_tune(base, x, y, common | {"lr": 0.05, "epochs": 30, "seed": seed})
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(MEMBERS):
        member = make_net(width)
        member.load_state_dict(base.state_dict())
        choice = draw(generator)
        fine_tune(member, x, y, choice | {"lr": choice["lr"] / 2, "epochs": 2 * choice["epochs"]})
        paths.append(folder / f"member-{k}.safetensors")
        save_file(member.state_dict(), paths[-1])
    return paths


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return test losses, and whether what is learned ships, for every size and granularity."""
    pixels, labels = load_pictures(args.data / "cifar10/train.parquet")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    train, held_out = order[:TRAIN], order[TRAIN : TRAIN + max(SIZES)]
    soup = twa.Soup(make_soup(args.output / f"soup-{seed}", pixels[train], labels[train], args.width, seed))
    test = TensorDataset(*load_pictures(args.data / "cifar10/test.parquet"))
    found: dict[str, Any] = {}
    for size in SIZES:
        known = TensorDataset(pixels[held_out[:size]], labels[held_out[:size]])
        recipe = Recipe(data=DataConfig(min_select=min(200, size // 2)))
        for name, granularity in GRANULARITIES.items():
            result = twa.train(
                soup, known, module=make_net(args.width), loss=F.cross_entropy, test=test, recipe=recipe,
                granularity=granularity, seed=seed,
            )  # fmt: skip
            for candidate in result.league:
                label = name if candidate.learned else candidate.name
                if candidate.learned or label in ("best single", "uniform", "greedy"):
                    found[f"{label}, {size} held out"] = {"loss": candidate.test.loss.value}
            found[f"{name}, {size} held out"] |= {
                "ships": result.verdict.winner.learned, "shipped": result.verdict.winner.test.loss.value
            }  # fmt: skip
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Return all seeds as Markdown: learned and shipped, each against the greedy soup of the same pictures."""
    rows = ["| | test loss | learned - greedy | ships - greedy | learned ships |", "|---|--:|--:|--:|--:|"]
    for name in (name for name, value in found[0].items() if isinstance(value, dict)):
        losses = [seed[name]["loss"] for seed in found]
        greedy = [seed[f"greedy, {name.partition(', ')[2]}"]["loss"] for seed in found]
        shipped = ["", ""]
        if "TWA" in name:
            count = f"{sum(seed[name]['ships'] for seed in found)} of {len(found)}"
            shipped = [paired([seed[name]["shipped"] for seed in found], greedy), count]
        rows.append(f"| {name} | {mean_sd(losses)} | {paired(losses, greedy)} | {' | '.join(shipped)} |")
    return "\n".join(rows)


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Draw the difference from the greedy soup over the number of held-out samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))

    def losses(name: str) -> Any:
        return np.array([[seed[f"{name}, {size} held out"]["loss"] for size in SIZES] for seed in found])

    for k, name in enumerate(("best single", "uniform", *GRANULARITIES)):
        less = losses(name) - losses("greedy")
        error = less.std(axis=0, ddof=1) / len(found) ** 0.5 if len(found) > 1 else 0
        places = np.array(SIZES) * 1.04 ** (k - 2)
        style = "-o" if "TWA" in name else "--s"
        axes.errorbar(places, less.mean(axis=0), error, fmt=style, capsize=2, ms=4, lw=1, color=f"C{k}", label=name)
    axes.axhline(0, color="0.5", lw=1, ls="--", label="greedy")
    axes.set_xscale("log")
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set(xlabel="held-out samples", ylabel="test loss less greedy's, ± standard error")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run all seeds, print the table, draw the plot."""
    parser = arguments(__doc__)
    parser.add_argument("--width", type=int, default=12)
    args = parser.parse_args()
    found = report(args, "held-out-size", lambda seed: run(args, seed), table)
    plot(found, args.output / "held-out-size.png")


if __name__ == "__main__":
    main()
