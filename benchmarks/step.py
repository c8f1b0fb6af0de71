"""A training step of the coefficients beside a plain forward + backward of the same model, as ratios in one process.

    OMP_NUM_THREADS=1 python benchmarks/step.py --batches 1 16 32 --storages float32 bfloat16 int8 int4

ViT-B/32, random weights, ten checkpoints. All kinds of step take turns, so that a noisy machine disturbs all of them.
CPU seconds of the process; medians of the ratios in each turn. The floor of float32 is to read its basis twice: two
`torch.sum` over a block of that size, in the same turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from twa_merge.basis import Basis
from twa_merge.groups import group_parameters
from twa_merge.model import MergedModel
from twa_merge.storage import STORAGES, block_maker


def vit_b32() -> nn.Module:
    """Return a randomly initialised ViT-B/32 with 1,000 classes (88 M parameters)."""
    return ViTForImageClassification(ViTConfig(patch_size=32, num_labels=1000))


def random_basis(module: nn.Module, num_checkpoints: int, granularity: str, storage: str) -> Basis:
    """Return a basis of small, heavy-tailed random deltas around the module's own weights."""
    parameters = dict(module.named_parameters())
    make = block_maker(storage, num_checkpoints, sum(p.numel() for p in parameters.values()))
    squares, blocks = {}, {}
    for name, parameter in parameters.items():
        shape = (num_checkpoints, parameter.numel())
        deltas = 1e-3 * torch.randn(shape) * torch.rand(shape).clamp_min(1e-3).pow(-0.25)
        deltas -= deltas.mean(dim=0)
        blocks[name] = make(parameter.numel())
        blocks[name].put(0, deltas, parameter.detach().view(-1))
        squares[name] = deltas.double().square().sum(dim=1)
    groups = group_parameters(parameters, granularity)
    norms = torch.stack([sum(squares[name] for name in names).sqrt() for names in groups.values()])
    return Basis(blocks, groups, norms, 1.0, storage)


def merged_step(args: argparse.Namespace, storage: str, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Return a training step of the coefficients."""
    module = vit_b32()
    labels = tuple(map(str, range(args.checkpoints)))
    merged = MergedModel(module, random_basis(module, args.checkpoints, args.granularity, storage), labels)
    merged.train()
    optimizer = torch.optim.AdamW(merged.parameters(), lr=1e-3)

    def step() -> None:
        merged(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


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
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=["float32"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    plain = vit_b32().train()
    numel = sum(p.numel() for p in plain.parameters())
    batch: dict[str, torch.Tensor] = {}  # what it holds changes; the steps see it
    rows = min(args.checkpoints, 10)  # of more, read more often: memory holds the basis beside it
    block = torch.ones(rows, numel)

    def plain_step() -> None:
        plain(**batch).loss.backward()
        plain.zero_grad(set_to_none=True)

    def floor() -> None:
        for _ in range(2 * args.checkpoints // rows):
            block.sum()

    steps: dict[str, Callable[[], None]] = {"plain": plain_step, "floor": floor}
    steps |= {storage: merged_step(args, storage, batch) for storage in args.storages}
    for size in args.batches:
        batch |= {"pixel_values": torch.randn(size, 3, 224, 224), "labels": torch.randint(0, 1000, (size,))}
        times = alternate(steps, args.repeats)
        report(size, {name: np.array(seconds) for name, seconds in times.items()}, args.storages)


def report(size: int, times: dict[str, np.ndarray], storages: list[str]) -> None:
    """Print the ratios of one batch size: medians over turns of ratios within a turn."""
    first = times[storages[0]] - times["plain"]
    for storage in storages:
        ratios, extra = times[storage] / times["plain"], times[storage] - times["plain"]
        print(
            f"batch {size:3d} {storage:8s}: plain {np.median(times['plain']):.3f} s, step over plain "
            f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}); extra {np.median(extra):.3f} s, over "
            f"reading float32 twice {np.median(extra / times['floor']):.2f}, over that of {storages[0]} "
            f"{np.median(extra / first):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
