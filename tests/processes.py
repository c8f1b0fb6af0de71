"""Several real processes, started by torchrun, that talk by gloo."""

import gc
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def torchrun(*command, processes=2, **environment):
    """Run a script, or `-m` and a module, with arguments in several processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([*launch, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300)


def leave():
    """End the process group in all processes; call it when nothing refers to a Trainer any more."""
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    check_left()


def check_left():
    """Fail if threads of gloo's run on: one that lets go of a tensor while the interpreter ends aborts the process.

    They end with the last reference to the process group, which DistributedDataParallel and so a Trainer hold
    (pytorch/pytorch#179291).
    """
    if sys.platform == "linux":
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        assert not [name for name in names if "gloo" in name], names
