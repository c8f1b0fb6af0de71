"""Every table of docs/performance.md and docs/scaling.md from fresh measurements, one benchmark after the other.

    OMP_NUM_THREADS=1 python benchmarks/all.py --folder gpt2-soup

Two to three quarters of an hour on an idle machine with 24 GiB of memory and 25 GB of disk; a soup of forty GPT-2-small
checkpoints is made in the folder if it is not there. With a GPU, also what learning on one takes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
ALL = ["float32", "bfloat16", "int8", "int4"]


def benchmarks(folder: str) -> list[tuple[str, list[str]]]:
    """Return (heading, command) of each benchmark."""
    found = [
        ("A step at batch 1", ["step.py", "--batches", "1", "--storages", *ALL, "--repeats", "9"]),
        ("A step at batch 32", ["step.py", "--batches", "32", "--storages", "float32", "int8", "int4"]),
        *(
            (f"{n} checkpoints", ["step.py", "--batches", "1", "--checkpoints", str(n), "--storages", "float32"])
            for n in (5, 10, 20, 40)
        ),
        ("Memory of a step", ["memory.py", "--checkpoints", "10", "40", "--storages", "float32", "int8", "int4"]),
        ("Set-up, and steps from disk", ["disk.py", "--folder", folder, "--checkpoints", "40"]),
        (
            "Set-up of ten",
            ["disk.py", "--folder", folder, "--checkpoints", "10", "--storages", "float32", "int8", "int4"],
        ),
        ("Several processes", ["processes.py", "--folder", folder, "--storage", "bfloat16"]),
        ("Simulated worlds", ["world.py"]),
    ]
    if torch.cuda.is_available():
        found.append(("A GPU", ["gpu.py"]))
    return found


def main() -> None:
    """Run them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="of the GPT-2-small soup")
    args = parser.parse_args()
    names = ("torch", "transformers", "accelerate")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"{platform.platform()}, {torch.get_num_threads()} thread(s), {versions}")
    for heading, command in benchmarks(args.folder):
        print(f"\n## {heading}\n\n    python benchmarks/{' '.join(command)}\n", flush=True)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]])
        print(f"\n({time.perf_counter() - start:.0f} s, exit code {done.returncode})", flush=True)


if __name__ == "__main__":
    main()
