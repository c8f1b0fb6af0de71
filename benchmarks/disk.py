"""Set-up and steps of a GPT-2-small soup from files, storage by storage (Linux).

    OMP_NUM_THREADS=1 python benchmarks/disk.py --folder gpt2-soup --checkpoints 40 --storages disk int4

In a process of its own for each storage: seconds and peak memory of the set-up, over those of the process before it;
seconds and private memory of a step. Beside it, in turns with the steps, what there is to do at least for `disk`: every
file read twice through a small buffer. 40 checkpoints in float32 are 20 GB; they are made if they are not there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from average import make_soup, member_paths

BATCH, LENGTH, STEPS = 1, 128, 3


def memory() -> dict[str, int]:
    """Return the kernel's account of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "Rss"))}


def read_all(files: list[Path]) -> float:
    """Return the seconds to read files once."""
    buffer = bytearray(1 << 20)
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def measure(folders: list[Path], storage: str) -> dict[str, Any]:
    """Set a soup up and take steps."""
    import torch
    from transformers import GPT2LMHeadModel

    import twa_merge as twa

    torch.set_num_threads(1)
    module = GPT2LMHeadModel.from_pretrained(folders[0])
    batch = {name: torch.randint(0, 50257, (BATCH, LENGTH)) for name in ("input_ids", "labels")}
    plain = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        module(**batch).loss.backward()
        module.zero_grad()
        plain.append(time.perf_counter() - start)
    soup = twa.Soup(folders)
    files = [file for source in soup.sources for file in source.files]
    read_all(files)  # what fits is in the cache
    found: dict[str, Any] = {"reading": [read_all(files)], "plain": plain[1:]}
    before = memory()["RssAnon"]
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    model = twa.merged_model(soup, module, storage=storage)
    found["setup"] = time.perf_counter() - start
    now = memory()
    # what was mapped is the system's to take back; the peak of the rest is what is asked for
    found["setup_peak"] = now["VmHWM"] - now["RssFile"] - before
    found["basis"] = model.basis.nbytes
    found["group"] = max(p.numel() for p in module.parameters()) * 4 * len(soup)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found["steps"], found["private"] = [], 0
    model.train()
    for step in range(STEPS + 1):
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        found["private"] = max(found["private"], memory()["RssAnon"])
        if step:  # the first one finds its way
            found["steps"].append(seconds)
            found["reading"].append(read_all(files))
    return found


def main() -> None:
    """Print a row for each storage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--checkpoints", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--storages", nargs="+", default=["disk", "int4"])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folders = member_paths(args.folder, args.checkpoints, args.dtype)
    if args.one:
        print(json.dumps(measure(folders, args.storages[0])))
        return
    if not folders[-1].is_dir():
        make_soup(args.folder, args.checkpoints, args.dtype)
    for storage in args.storages:
        command = [sys.executable, __file__, "--one", "--folder", str(args.folder), "--dtype", args.dtype]
        command += ["--checkpoints", str(args.checkpoints), "--storages", storage]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        step, reading, plain = (statistics.median(found[what]) for what in ("steps", "reading", "plain"))
        setup, peak, basis, group, private = (
            found[what] / 1e6 for what in ("setup", "setup_peak", "basis", "group", "private")
        )
        print(
            f"{storage:8s} N={args.checkpoints}: set-up {1e6 * setup:.1f} s = {1e6 * setup / reading:.2f} of reading "
            f"once, peak {peak:.0f} MB (basis {basis:.0f} MB, largest tensor of all checkpoints {group:.0f} MB); "
            f"step {step:.2f} s = {step / (2 * reading):.2f} of reading twice ({2 * reading:.2f} s), "
            f"less a plain step ({plain:.2f} s) {(step - plain) / (2 * reading):.2f}, "
            f"private memory {private:.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
