"""Peak memory of a training step of the coefficients over that of a plain step, in processes of their own (Linux).

    OMP_NUM_THREADS=1 python benchmarks/memory.py

ViT-B/32, random weights, ten checkpoints, float32 basis, batch 1. The peak is the kernel's (VmHWM), reset after the
model, the basis and two warm-up steps are there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

NUM_CHECKPOINTS = 10


def peak_of_steps(kind: str) -> None:
    """Take steps of one kind and print the process's peak in bytes and the sizes of D and the basis."""
    import torch
    from step import random_basis, vit_b32

    from twa_merge.model import MergedModel

    torch.manual_seed(0)
    module = vit_b32()
    size = sum(p.nbytes for p in module.parameters())
    model = module
    basis_bytes = 0
    if kind == "merged":
        basis = random_basis(module, NUM_CHECKPOINTS, "tensor")
        basis_bytes = basis.nbytes
        model = MergedModel(module, basis, tuple(map(str, range(NUM_CHECKPOINTS))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3) if kind == "merged" else None
    model.train()
    batch = {"pixel_values": torch.randn(1, 3, 224, 224), "labels": torch.zeros(1, dtype=torch.long)}
    for step in range(5):
        if step == 2:
            Path("/proc/self/clear_refs").write_text("5")
        model(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"peak": int(line.split()[1]) * 1024, "D": size, "basis_and_centre": basis_bytes}))


def main() -> None:
    """Compare both kinds."""
    found = {}
    for kind in ("plain", "merged"):
        done = subprocess.run([sys.executable, __file__, kind], check=True, capture_output=True, text=True)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    extra = found["merged"]["peak"] - found["plain"]["peak"]
    allowed = found["merged"]["basis_and_centre"]
    size = found["plain"]["D"]
    print(f"plain step: {found['plain']['peak'] / 2**20:.0f} MiB, merged: {found['merged']['peak'] / 2**20:.0f} MiB")
    print(f"extra over basis + centre ({allowed / 2**20:.0f} MiB): {(extra - allowed) / size:+.2f} D")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        peak_of_steps(sys.argv[1])
    else:
        main()
