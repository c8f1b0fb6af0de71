"""How much memory is free, and what to do when there was not enough."""

from __future__ import annotations

import contextlib
import errno
import gc
import sys
from pathlib import Path

import torch

from twa_merge.errors import UserError


class OutOfMemory(UserError):
    """There is not enough memory, and nothing smaller to try at this level."""


def free_memory(device: torch.device) -> int:
    """Return the bytes of free memory on a device; of the CPU, what the process may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    with contextlib.suppress(OSError, ValueError):
        held = int(used.read_text()) - _file_cache(used.with_name("memory.stat"))
        free = min(free, int(limit.read_text()) - held)
    return free


def free_in_every_process(device: torch.device) -> int:
    """Return the bytes that each process may take: the least of all; those on CPUs share what is free."""
    free = torch.tensor(float(free_memory(device)), dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(free, op=torch.distributed.ReduceOp.MIN)
        if device.type == "cpu":
            free /= torch.distributed.get_world_size()
    return int(free)


def _file_cache(statistics: Path) -> int:
    """Return the bytes of a control group that hold files, and are the system's to take back."""
    for line in statistics.read_text().splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, OSError) and error.errno == errno.ENOMEM
    ):
        return True
    from accelerate.utils.memory import should_reduce_batch_size

    others = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, Exception) and (
        should_reduce_batch_size(error) or (isinstance(error, RuntimeError) and any(o in str(error) for o in others))
    )


def drop_cached() -> None:
    """Give memory back that a failed attempt has left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def smaller_batch(batch_size: int, least: int = 1) -> int | None:
    """Return the largest divisor of a batch size that is smaller and at least `least`, or None."""
    return next((size for size in range(batch_size // 2, least - 1, -1) if batch_size % size == 0), None)


def say(text: str, *, main_process: bool = True) -> None:
    """Print a line on stderr, once for all processes."""
    if main_process:
        print(text, file=sys.stderr)
