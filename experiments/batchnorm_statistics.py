"""From how many samples BatchNorm's statistics of a merge must be recomputed.

    python experiments/batchnorm_statistics.py --data DATA --soups SOUPS

The uniform soup of the ResNet-20s of `soups/resnet20_cifar10.py`: statistics from random pictures, loss on 1,000 of the
test set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from soups.resnet20 import ResNet20, load_pictures
from torch.nn import functional as F

import twa_merge as twa
from twa_merge import buffers
from twa_merge.assembly import load_merge

SIZES, DRAWS = (256, 512, 1024, 2048, 4096), 6


def main() -> None:
    """Print mean and standard deviation of the loss over draws, for each number of samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--soups", type=Path, required=True)
    args = parser.parse_args()
    soup = twa.Soup(sorted((args.soups / "resnet20-1").glob("member-*"))[:8])
    net = ResNet20()
    load_merge(net, soup, twa.uniform(soup.labels))
    train, _ = load_pictures(args.data / "cifar10/train.parquet")
    x, y = (part[:1000] for part in load_pictures(args.data / "cifar10/test.parquet"))
    print("| samples | loss, mean over draws | sd over draws | accuracy |\n|--:|--:|--:|--:|")
    for size in SIZES:
        losses, accuracies = [], []
        for draw in range(DRAWS):
            chosen = np.random.default_rng(draw).permutation(len(train))[:size]
            buffers.recompute(net, train[torch.from_numpy(chosen)].split(32), lambda module, batch: module(batch))
            with torch.no_grad():
                logits = net.eval()(x)
            losses.append(float(F.cross_entropy(logits, y)))
            accuracies.append(float((logits.argmax(dim=1) == y).float().mean()))
        print(
            f"| {size} | {np.mean(losses):.4f} | {np.std(losses, ddof=1):.4f} | {np.mean(accuracies):.4f} |", flush=True
        )


if __name__ == "__main__":
    main()
