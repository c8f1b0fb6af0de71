"""A training step of the coefficients beside a plain forward + backward of the same model, as ratios in one process.

    OMP_NUM_THREADS=1 python benchmarks/step.py

ViT-B/32, random weights, ten checkpoints, float32 basis. Both kinds of step take turns, so that a noisy machine
disturbs both. CPU seconds of the process; medians. Also the memory that a step adds to a plain one.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from twa_merge.basis import Basis
from twa_merge.groups import group_parameters
from twa_merge.model import MergedModel


def vit_b32() -> nn.Module:
    """Return a randomly initialised ViT-B/32 with 1,000 classes (88 M parameters)."""
    return ViTForImageClassification(ViTConfig(patch_size=32, num_labels=1000))


def random_basis(module: nn.Module, num_checkpoints: int, granularity: str) -> Basis:
    """Return a basis of small random deltas around the module's own weights."""
    parameters = dict(module.named_parameters())
    blocks = {}
    for name, parameter in parameters.items():
        block = torch.empty(num_checkpoints + 1, parameter.numel())
        block[:-1].normal_(std=1e-3)
        block[:-1] -= block[:-1].mean(dim=0)
        block[-1] = parameter.detach().view(-1)
        blocks[name] = block
    groups = group_parameters(parameters, granularity)
    norms = torch.stack(
        [sum(blocks[n][:-1].double().square().sum(1) for n in names).sqrt() for names in groups.values()]
    )
    return Basis(blocks, groups, norms)


def alternate(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Time each step in turn, in CPU seconds, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if repeat:
                times[name].append(time.process_time() - start)
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--granularity", default="tensor")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)

    plain = vit_b32()
    merged = MergedModel(
        inner := vit_b32(), random_basis(inner, args.checkpoints, args.granularity),
        tuple(map(str, range(args.checkpoints))),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(merged.parameters(), lr=1e-3)
    plain.train()
    merged.train()
    found = {"threads": torch.get_num_threads(), "checkpoints": args.checkpoints, "ratios": {}}
    for batch in args.batches:
        pixels, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))

        def plain_step(pixels: torch.Tensor = pixels, labels: torch.Tensor = labels) -> None:
            plain(pixel_values=pixels, labels=labels).loss.backward()
            plain.zero_grad(set_to_none=True)

        def merged_step(pixels: torch.Tensor = pixels, labels: torch.Tensor = labels) -> None:
            merged(pixel_values=pixels, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        times = alternate({"plain": plain_step, "merged": merged_step}, args.repeats)
        ratio = statistics.median(m / p for m, p in zip(times["merged"], times["plain"], strict=True))
        spread = sorted(m / p for m, p in zip(times["merged"], times["plain"], strict=True))
        found["ratios"][f"batch {batch}"] = round(ratio, 3)
        print(
            f"batch {batch:3d}: plain {statistics.median(times['plain']):.3f} s, "
            f"step {statistics.median(times['merged']):.3f} s, ratio {ratio:.2f} ({spread[0]:.2f} to {spread[-1]:.2f})"
        )
    found["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(found))


if __name__ == "__main__":
    main()
