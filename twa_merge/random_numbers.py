"""Random numbers that what is compared shares: Python's, NumPy's and torch's."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def fixed_random_numbers() -> Iterator[None]:
    """Draw the same random numbers at every entry; afterwards Python's, NumPy's and torch's go on as before."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            seed_all(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def seed_all(seed: int) -> None:
    """Seed all three."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
