"""What several processes hold and exchange: real ones, over gloo, with a GPT-2-small soup from files (Linux).

    OMP_NUM_THREADS=1 python benchmarks/processes.py --folder gpt2-soup --processes 1 2 4 --storage int8

For each way to share: memory of the basis, private memory of a process at rest and its peak in a step, bytes of the
collectives of a step, coefficients after some steps of SGD against those of one process (with `--storage float32` they
are equal to rounding; blocks of few bits lie differently in other parts). The soup is made if it is not there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from average import make_soup, member_paths
from traffic import Traffic


def in_process(rank: int, world: int, shard: str, args: argparse.Namespace, out: str) -> None:
    """Take steps and write down what they cost."""
    from disk import memory
    from transformers import GPT2LMHeadModel

    import twa_merge as twa

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    if world > 1:
        store = torch.distributed.FileStore(f"{out}/store", world)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    folders = member_paths(args.folder, args.checkpoints, "float32")
    # None: loaded as the command does, and if it is to be spread, never whole
    module = GPT2LMHeadModel.from_pretrained(folders[0]) if shard == "none" else None
    model = twa.merged_model(twa.Soup(folders), module, granularity="layer", storage=args.storage, shard=shard)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 and shard == "none" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 50257, (4, 64), generator=generator)
    batch = dict.fromkeys(("input_ids", "labels"), whole[rank::world])
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the set-up has left behind
    rest = memory()["RssAnon"]
    Path("/proc/self/clear_refs").write_text("5")
    traffic = Traffic()
    for step in range(args.steps):
        # counted once: torch runs no compiled kernel beside a counter
        with traffic if step + 1 == args.steps else contextlib.nullcontext():
            wrapped(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    now = memory()
    found: dict[str, Any] = {
        "basis": model.basis.nbytes,
        "rest": rest,
        "peak": now["VmHWM"] - now["RssFile"],
        "nbytes": dict(traffic.nbytes),
        "numel": sum(p.numel() for p in model.module.parameters()),
        "coefficients": model.twa_coefficients.detach().double().tolist(),
    }
    Path(out, f"{rank}.json").write_text(json.dumps(found))


def main() -> None:
    """Print a row for each number of processes and way to share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--storage", default="float32")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    if not member_paths(args.folder, args.checkpoints, "float32")[-1].is_dir():
        make_soup(args.folder, args.checkpoints, "float32")
    print("| K | shared | basis, MB | at rest, MB | peak of a step, MB | exchanged a step, bytes | coefficients off |")
    print("|--:|---|--:|--:|--:|---|--:|")
    alone = None
    for world in args.processes:
        for shard in ("none", "basis", "model") if world > 1 else ("none",):
            with tempfile.TemporaryDirectory() as out:
                torch.multiprocessing.spawn(in_process, args=(world, shard, args, out), nprocs=world)
                runs = [json.loads(Path(out, f"{rank}.json").read_text()) for rank in range(world)]
            coefficients = torch.tensor(runs[0]["coefficients"])
            alone = coefficients if alone is None else alone
            off = float((coefficients - alone).norm() / alone.norm())
            basis, rest, peak = (max(run[what] for run in runs) / 1e6 for what in ("basis", "rest", "peak"))
            nbytes = {k: f"{v / runs[0]['numel']:.2f} D" if v > 1e6 else v for k, v in runs[0]["nbytes"].items()}
            sent = ", ".join(f"{name} {size}" for name, size in nbytes.items()) or "nothing"
            print(f"| {world} | {shard} | {basis:.0f} | {rest:.0f} | {peak:.0f} | {sent} | {off:.1e} |", flush=True)


if __name__ == "__main__":
    main()
