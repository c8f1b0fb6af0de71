"""Peak memory of a training step of the coefficients over that of a plain step, in processes of their own (Linux).

    OMP_NUM_THREADS=1 python benchmarks/memory.py --checkpoints 10 40 --storages float32 int8 int4

ViT-B/32, random weights, batch 1. The peak is the kernel's (VmHWM), reset after the model, the basis and two warm-up
steps are there.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path


def peak_of_steps(storage: str, num_checkpoints: int) -> None:
    """Take plain steps, or steps of coefficients, and print the peak in bytes and the sizes of D and the basis."""
    import torch
    from step import random_basis, vit_b32

    from twa_merge.model import MergedModel

    torch.manual_seed(0)
    module = vit_b32()
    size = sum(p.nbytes for p in module.parameters())
    model = module
    basis_bytes = 0
    if storage != "plain":
        basis = random_basis(module, num_checkpoints, "tensor", storage)
        basis_bytes = basis.nbytes
        model = MergedModel(module, basis, tuple(map(str, range(num_checkpoints))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3) if storage != "plain" else None
    model.train()
    batch = {"pixel_values": torch.randn(1, 3, 224, 224), "labels": torch.zeros(1, dtype=torch.long)}
    for step in range(5):
        if step == 2:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what making the random basis has left behind
            Path("/proc/self/clear_refs").write_text("5")
        model(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"peak": int(line.split()[1]) * 1024, "D": size, "basis_and_centre": basis_bytes}))


def measured(storage: str, num_checkpoints: int) -> dict[str, int]:
    """Return the figures of a process of its own."""
    command = [sys.executable, __file__, "--one", storage, "--checkpoints", str(num_checkpoints)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Compare steps with a basis to plain ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[10])
    parser.add_argument("--storages", nargs="+", default=["float32"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return peak_of_steps(args.one, args.checkpoints[0])
    plain = measured("plain", 0)
    print(f"plain step: {plain['peak'] / 2**20:.0f} MiB")
    for count in args.checkpoints:
        for storage in args.storages:
            found = measured(storage, count)
            allowed, extra = found["basis_and_centre"], found["peak"] - plain["peak"]
            print(
                f"N={count:2d} {storage:8s}: {found['peak'] / 2**20:.0f} MiB, extra {extra / 2**20:.0f} MiB, over "
                f"basis + centre ({allowed / 2**20:.0f} MiB): {(extra - allowed) / plain['D']:+.2f} D; basis "
                f"{allowed / plain['D'] - 1:.2f} D = {(allowed / plain['D'] - 1) * 4 / count:.3f} bytes an element",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
