"""A step of the coefficients on a GPU beside a plain one: time, peak memory, and five epochs of a small validation set.

    python benchmarks/gpu.py --checkpoints 72 --storage int4 --batch 128

ViT-B/32, random weights, bf16 autocast. Both kinds of step take turns; medians. `--device cpu` tries the script out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from step import random_basis, vit_b32

from twa_merge.model import MergedModel

PICTURES, EPOCHS = 26_000, 5


def peak_of(step: Callable[[], None], device: torch.device) -> float:
    """Return the peak memory of a step, GB; what is held before it included."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e9


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """Return the time of a step."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--checkpoints", type=int, default=72)
    parser.add_argument("--storage", default="int4")
    parser.add_argument("--granularity", default="tensor")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    pixels = torch.randn(args.batch, 3, 224, 224, device=device)
    labels = torch.zeros(args.batch, dtype=torch.long, device=device)

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss: torch.Tensor = model(pixel_values=pixels, labels=labels).loss
        return loss

    plain = vit_b32().to(device).train()

    def plain_step() -> None:
        loss_of(plain).backward()
        plain.zero_grad(set_to_none=True)

    plain_step()
    plain_peak = peak_of(plain_step, device)
    module = vit_b32()
    basis = random_basis(module, args.checkpoints, args.granularity, args.storage)
    model = MergedModel(module, basis, tuple(map(str, range(args.checkpoints)))).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    times = [(seconds_of(plain_step, device), seconds_of(step, device)) for _ in range(args.repeats)]
    ratio = statistics.median(merged / base for base, merged in times)
    seconds = statistics.median(merged for _, merged in times)
    plain.cpu()
    peak = peak_of(step, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {args.storage}, N={args.checkpoints}, batch {args.batch}")
    print(f"step over plain {ratio:.2f}; {1e3 * seconds:.1f} ms a step")
    print(f"peak {peak:.2f} GB, plain {plain_peak:.2f} GB, basis and centre {basis.nbytes / 1e9:.2f} GB")
    steps = EPOCHS * -(-PICTURES // args.batch)
    print(f"{EPOCHS} epochs of {PICTURES} pictures: {steps * seconds:.0f} s of training steps")


if __name__ == "__main__":
    main()
