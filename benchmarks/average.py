"""`twa-merge average` of GPT-2-small checkpoints beside the least work there is, as ratios in one run.

    OMP_NUM_THREADS=1 python benchmarks/average.py --folder gpt2-soup

The floor is one process that imports torch, reads five files and writes one. mergekit's `linear` on the same files
joins in with `--mergekit PATH`, its `mergekit-yaml` (in an environment of its own). The commands take turns; whole
processes, CPU and wall seconds, medians of the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

_FLOOR = """
import torch
for path in {inputs!r}:
    with open(path, 'rb', buffering=0) as file:
        buffer = bytearray(1 << 22)
        while file.readinto(buffer):
            pass
with open({output!r}, 'wb', buffering=0) as out:
    for _ in range({size} // len(buffer)):
        out.write(buffer)
    os = __import__('os'); os.fsync(out.fileno())
"""


def member_paths(folder: Path, count: int, dtype: str) -> list[Path]:
    """Return where the checkpoints of a dtype are."""
    return [folder / f"{dtype}-{k}" for k in range(count)]


def make_soup(folder: Path, count: int, dtype: str) -> None:
    """Save `count` GPT-2-small checkpoints: one random base, small random deltas."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    for path in member_paths(folder, count, dtype):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        model.to(getattr(torch, dtype)).save_pretrained(path)
        model.float()


def run(command: list[str]) -> tuple[float, float, float]:
    """Return CPU seconds, wall seconds and peak MB of a whole process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        assert process.stderr is not None
        raise SystemExit(f"{command[0]} failed: {process.stderr.read().decode()[-800:]}")
    return usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1024


def commands(paths: list[Path], folder: Path, mergekit: str | None) -> dict[str, list[str]]:
    """Return the command lines to compare."""
    files = [str(path / "model.safetensors") for path in paths]
    out = folder / "out"
    floor = _FLOOR.format(inputs=files, output=str(folder / "floor.bin"), size=os.path.getsize(files[0]))
    found = {
        "floor": [sys.executable, "-c", floor],
        "twa-merge": [shutil.which("twa-merge") or "twa-merge", "average", *map(str, paths), "--output", str(out),
                      "--overwrite"],
    }  # fmt: skip
    if mergekit is not None:
        config = {
            "models": [{"model": str(p), "parameters": {"weight": 1 / len(paths)}} for p in paths],
            "merge_method": "linear",
            "dtype": paths[0].name.partition("-")[0],
        }
        (folder / "mergekit.yaml").write_text(json.dumps(config))
        found["mergekit"] = [mergekit, str(folder / "mergekit.yaml"), str(folder / "mergekit-out")]
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[5])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mergekit", help="path of mergekit-yaml")
    args = parser.parse_args()
    for dtype in ("float32", "bfloat16"):
        paths = member_paths(args.folder, max(args.counts), dtype)
        if not paths[-1].exists():
            # in a process of its own: peak memory of a child counts from the parent's at the fork
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                pool.submit(make_soup, args.folder, max(args.counts), dtype).result()
        for count in args.counts:
            paths = member_paths(args.folder, count, dtype)
            todo = commands(paths, args.folder, args.mergekit)
            measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in todo}
            for repeat in range(args.repeats + 1):
                for name, command in todo.items():
                    figures = run(command)
                    if repeat:
                        measured[name].append(figures)
            for name, rows in measured.items():
                cpu, wall, peak = (statistics.median(column) for column in zip(*rows, strict=True))
                ratios = [
                    statistics.median(a[i] / b[i] for a, b in zip(rows, measured["floor"], strict=True)) for i in (0, 1)
                ]
                print(
                    f"{dtype} N={count:2d} {name:10s} cpu {cpu:6.2f} s  wall {wall:6.2f} s  "
                    f"peak {peak:6.0f} MB  over floor: cpu {ratios[0]:.2f} wall {ratios[1]:.2f}"
                )


if __name__ == "__main__":
    main()
