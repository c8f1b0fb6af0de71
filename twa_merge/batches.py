"""Which samples a step sees: the same however the step is divided into passes and processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from twa_merge.errors import UserError
from twa_merge.tasks import Batch, Task, to_device

if TYPE_CHECKING:
    from accelerate import Accelerator

    from twa_merge.learn_config import LearnConfig


def batch_indices(
    num_samples: int, config: LearnConfig, steps: range, *, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """Return the samples of each forward pass of one process, `accumulation` passes for each step.

    Steps read one endless stream of permutations, so a step has the same samples however it is divided, and a resumed
    run goes on where it stopped.
    """
    passes: list[list[int]] = []
    size = config.batch_size * config.accumulation
    orders: dict[int, list[int]] = {}
    for step in steps:
        chosen = []
        for position in range(step * size, (step + 1) * size):
            epoch, offset = divmod(position, num_samples)
            if epoch not in orders:
                generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
                orders = {epoch: torch.randperm(num_samples, generator=generator).tolist()}
            chosen.append(orders[epoch][offset])
        for first in range(0, size, config.batch_size):
            passes.append(chosen[first : first + config.batch_size][rank::world])
    return passes


def load_batches(
    fit: Any, task: Task, config: LearnConfig, steps: range, accelerator: Accelerator
) -> Iterator[list[Batch]]:
    """Yield this process's batches of each step, on its device.

    Raises:
        UserError: the batch is smaller than the number of processes.
    """
    from torch.utils.data import DataLoader

    rank, world = accelerator.process_index, accelerator.num_processes
    if config.batch_size < world:
        raise UserError(f"batch_size: {config.batch_size} is less than the number of processes, {world}")
    passes = batch_indices(len(fit), config, steps, rank=rank, world=world)
    loader: Any = iter(DataLoader(fit, batch_sampler=passes, collate_fn=task.collate))  # type: ignore[arg-type]
    for _ in steps:
        yield [to_device(next(loader), accelerator.device) for _ in range(config.accumulation)]
