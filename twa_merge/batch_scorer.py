"""One batch through a module: losses and predictions, in smaller parts once memory has run out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from twa_merge.errors import UserError
from twa_merge.memory import OutOfMemory, drop_cached, is_out_of_memory, say
from twa_merge.sharding import is_sharded
from twa_merge.task_base import Task, difference, to_device


def _score(module: nn.Module, batch: Any, task: Task, autocast: Callable[[], Any]) -> tuple[Any, ...]:
    parameter = next(module.parameters(), None)
    if parameter is not None:
        batch = to_device(batch, parameter.device)
    asked = [metric for metric in task.metrics if not metric.from_loss]
    predictions: list[Any] = []
    references: list[Any] = []
    with autocast():
        outputs = task.forward(module, batch)
        loss, weight = task.sample_losses(outputs, batch)
        if asked and task.predictions is not None and not any(metric.needs_text for metric in asked):
            predictions, references = task.predictions(outputs, batch)
        elif asked and task.generate is not None:
            del outputs
            predictions, references = task.generate(module, batch)
        elif asked:
            need = "text" if asked[0].needs_text else "predictions"
            raise UserError(f"metric {asked[0].name}: needs {need}, which {task.name} does not give")
    return loss.double().cpu().numpy(), weight.double().cpu().numpy(), predictions, references


class BatchScorer:
    """Scores batches, in smaller parts once memory has run out."""

    def __init__(self, module: nn.Module, task: Task, autocast: Callable[[], Any], dataset: Any) -> None:
        self.module, self.task, self.autocast, self.dataset = module, task, autocast, dataset
        self.most: int | None = None
        # processes that share a model take part in each other's passes: they must make equally many
        self.may_divide = not is_sharded(module)

    def score(self, batch: Any, samples: list[int]) -> tuple[Any, ...]:
        """Return losses, weights, predictions and references of a batch, made of these samples."""
        while True:
            try:
                if self.most is None or len(samples) <= self.most:
                    return _score(self.module, batch, self.task, self.autocast)
                return self._in_parts(samples, self.most)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                tried = min(self.most or len(samples), len(samples))
                drawn = self._are_drawn(samples)
                if tried == 1 or not self.may_divide or drawn:
                    why = ", whose batches are drawn at random and cannot be divided" if drawn else ""
                    raise OutOfMemory(
                        f"out of memory with {tried} sample(s) in a scoring pass{why}: try a smaller "
                        "--eval-batch-size, --mixed-precision bf16 or shorter inputs (--max-length)"
                    ) from error
                self.most = tried // 2
            drop_cached()
            say(f"out of memory with {tried} samples in a scoring pass: going on with {self.most}")

    def _are_drawn(self, samples: list[int]) -> bool:
        """Whether batches hold random numbers: those of parts would be others, and candidates no longer compare."""
        one, other = (self.task.collate([self.dataset[i] for i in samples]) for _ in range(2))
        return difference(one, other) is not None

    def _in_parts(self, samples: list[int], size: int) -> tuple[Any, ...]:
        parts = []
        for start in range(0, len(samples), size):
            batch = self.task.collate([self.dataset[i] for i in samples[start : start + size]])
            parts.append(_score(self.module, batch, self.task, self.autocast))
        losses, weights, *others = zip(*parts, strict=True)
        predictions, references = (list(itertools.chain.from_iterable(lists)) for lists in others)
        return np.concatenate(losses), np.concatenate(weights), predictions, references
