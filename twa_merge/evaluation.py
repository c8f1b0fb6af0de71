"""What a module scores on a split: the loss of every sample, metrics, and how certain differences are.

Legend: S samples, R resamples.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from twa_merge import sharding
from twa_merge.batch_scorer import BatchScorer
from twa_merge.errors import UserError
from twa_merge.memory import OutOfMemory
from twa_merge.metrics import Metric, standard_error
from twa_merge.random_numbers import fixed_random_numbers, seed_all
from twa_merge.task_base import Task

_RESAMPLES_AT_ONCE = 100
_Row = tuple[int, np.ndarray, np.ndarray, list[Any], list[Any]]


@dataclass(frozen=True)
class Scores:
    """A value, and the standard error that comes of the finite number of samples (NaN for fewer than 2)."""

    value: float
    standard_error: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a module gave on each sample of a split, in the order of the split."""

    losses_S: np.ndarray
    """float64, each sample's mean loss."""
    weights_S: np.ndarray
    """float64, number of label elements of each sample."""
    predictions: list[Any]
    """S of them, or none where no metric needs them."""
    references: list[Any]
    metrics: tuple[Metric, ...]

    @property
    def loss(self) -> Scores:
        """The weighted mean loss, with the standard error of a ratio of two means."""
        return _weighted_mean(self.losses_S, self.weights_S)

    @property
    def ranking_loss(self) -> float:
        """The mean loss to choose by; infinite where it is NaN, which compares with nothing."""
        value = self.loss.value
        return value if math.isfinite(value) else math.inf

    def metric(self, name: str) -> Scores:
        """Return a metric of the task by name, of the samples with a label; `loss` is one too.

        Raises:
            UserError: the task has no such metric.
        """
        if name == "loss":
            return self.loss
        metric = next((metric for metric in self.metrics if metric.name == name), None)
        if metric is None:
            known = ", ".join(["loss", *(metric.name for metric in self.metrics)])
            raise UserError(f"metric {name}: not computed here; expected one of {known}")
        if metric.from_loss:
            loss = self.loss
            ends = [metric.compute([loss.value + sign * loss.standard_error], []) for sign in (-1, 1)]
            return Scores(metric.compute([loss.value], []), abs(ends[1] - ends[0]) / 2)
        labelled = np.flatnonzero(self.weights_S)
        predictions, references = ([values[i] for i in labelled] for values in (self.predictions, self.references))
        return Scores(metric.compute(predictions, references), standard_error(metric, predictions, references))

    def subset(self, indices: Sequence[int]) -> Evaluation:
        """Return the evaluation of some of the samples, in the order given."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            losses_S=self.losses_S[chosen],
            weights_S=self.weights_S[chosen],
            predictions=[self.predictions[i] for i in chosen] if self.predictions else [],
            references=[self.references[i] for i in chosen] if self.references else [],
        )


def evaluate(
    module: nn.Module,
    dataset: Any,
    task: Task,
    *,
    batch_size: int,
    accelerator: Any = None,
    progress: bool = False,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    num_workers: int = 0,
) -> Evaluation:
    """Return what a module gives on every sample, in `eval()` mode and without gradients.

    Batches hold samples of like length, and are the same for any number of processes: each process takes a share of
    them and all get the result. Every process runs the module equally often (a spare batch may run twice), as modules
    spread over processes need. What a data set or collator draws at random (masks, crops) is the same for each batch at
    every call, so that models are compared on the same inputs; the caller's random numbers go on as if none were drawn.

    Args:
        module: on the device that the batches are to be moved to; its modes are restored afterwards.
        dataset: features, as of `task.prepare`.
        task: with a loss of one value a batch, samples are run one by one.
        batch_size: B.
        accelerator: an `accelerate.Accelerator`, for several processes; its `autocast` is used unless one is given.
        progress: show a bar on stderr, in the main process.
        autocast: makes the context of each forward pass, e.g. `lambda: torch.autocast("cuda", torch.bfloat16)`.
        num_workers: processes that read and collate.

    Raises:
        OutOfMemory: in every process, if one of them cannot score a single sample.
    """
    if batch_size < 1:
        raise UserError(f"batch_size: expected at least 1, got {batch_size}")
    num_samples, size = len(dataset), batch_size if task.per_sample else 1
    if num_samples == 0:
        raise UserError("data: nothing to evaluate, the dataset is empty")
    order = _longest_first(dataset)
    batches = [order[start : start + size] for start in range(0, num_samples, size)]
    mine = _share(len(batches), accelerator)
    if autocast is None:
        autocast = contextlib.nullcontext if accelerator is None else accelerator.autocast
    loader = _loader(dataset, [batches[number] for number in mine], task, num_workers)
    rows: dict[int, _Row] = {}
    scoring = BatchScorer(module, task, autocast, dataset)
    failed: OutOfMemory | None = None
    with evaluation_mode(module), torch.no_grad(), fixed_random_numbers():
        try:
            drawn = _bar(_seeded(loader, mine), len(mine), progress, accelerator)
            for number, batch in zip(mine, drawn, strict=True):
                rows[number] = (number, *scoring.score(batch, batches[number]))
        except OutOfMemory as error:
            if accelerator is not None and accelerator.num_processes > 1 and sharding.is_sharded(module):
                raise UserError(str(error)) from error  # the others wait for this one inside: there is no going on
            failed = error
    found = _gather(list(rows.values()) if failed is None else [failed], accelerator)
    for item in found:
        if isinstance(item, OutOfMemory):
            raise item
    return _assemble(found, task, order)


def paired_difference(a: Evaluation, b: Evaluation) -> Scores:
    """Return the loss of `a` minus that of `b` on the same samples, with its standard error: below 0, `a` is better."""
    _check_paired(a, b)
    return _weighted_mean(a.losses_S - b.losses_S, a.weights_S)


def bootstrap_paired(a: Evaluation, b: Evaluation, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the paired difference of losses, by the bootstrap over samples (percentiles)."""
    _check_paired(a, b)
    rng = np.random.default_rng(seed)
    num_samples = len(a.losses_S)
    weighted_S = (a.losses_S - b.losses_S) * a.weights_S
    values_R = []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        drawn = rng.integers(num_samples, size=(min(_RESAMPLES_AT_ONCE, resamples - start), num_samples))
        values_R.append(weighted_S[drawn].sum(axis=1) / a.weights_S[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(values_R), [0.025, 0.975])
    return float(low), float(high)


def _seeded(loader: Any, numbers: list[int]) -> Iterator[Any]:
    """Yield batches, each drawn with random numbers of its own, whichever process draws it."""
    batches = iter(loader)
    for number in numbers:
        seed_all(number)
        yield next(batches)


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in `eval()` mode, and afterwards every part of it back in the mode it was in."""
    modes = [(inner, inner.training) for inner in module.modules()]
    module.eval()
    try:
        yield
    finally:
        module.train(modes[0][1])  # reaches modules that a wrapper keeps out of its tree
        for inner, mode in modes:
            inner.training = mode


def _weighted_mean(values_S: np.ndarray, weights_S: np.ndarray) -> Scores:
    """Return sum(w v) / sum(w) and its linearised standard error, sqrt(S / (S - 1) sum(w^2 (v - mean)^2)) / sum(w)."""
    num_samples, total = len(values_S), weights_S.sum()
    if num_samples == 0 or total == 0:
        return Scores(math.nan, math.nan)
    mean = float((weights_S * values_S).sum() / total)
    if num_samples < 2:
        return Scores(mean, math.nan)
    squares = ((weights_S * (values_S - mean)) ** 2).sum()
    return Scores(mean, float(np.sqrt(num_samples / (num_samples - 1) * squares) / total))


def _check_paired(a: Evaluation, b: Evaluation) -> None:
    if len(a.weights_S) != len(b.weights_S):
        raise ValueError(f"evaluations are not of the same samples: {len(a.weights_S)} and {len(b.weights_S)}")
    if not np.array_equal(a.weights_S, b.weights_S):
        differ = int((a.weights_S != b.weights_S).sum())
        raise ValueError(f"evaluations are not of the same labels: {differ} samples have other numbers of them")


def _loader(dataset: Any, batches: list[list[int]], task: Task, num_workers: int) -> Any:
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=task.collate,
        num_workers=num_workers,
        # without a generator of its own it draws from the global stream, and evaluating would change training
        generator=torch.Generator(),
    )


def _longest_first(dataset: Any) -> list[int]:
    """Return the samples in an order in which batches of token ids hold little padding."""
    first = dataset[0]
    if not isinstance(first, Mapping) or not hasattr(first.get("input_ids"), "__len__"):
        return list(range(len(dataset)))
    lengths = [len(dataset[i]["input_ids"]) for i in range(len(dataset))]
    return sorted(range(len(dataset)), key=lambda i: -lengths[i])


def _share(num_batches: int, accelerator: Any) -> list[int]:
    """Return the numbers of this process's batches: every K-th, as many in each process (wrapping round at the end)."""
    processes = 1 if accelerator is None else accelerator.num_processes
    first = 0 if accelerator is None else accelerator.process_index
    return [(first + turn * processes) % num_batches for turn in range(math.ceil(num_batches / processes))]


def _gather(items: list[Any], accelerator: Any) -> list[Any]:
    """Return what all processes have."""
    if accelerator is None or accelerator.num_processes == 1:
        return items
    from accelerate.utils import gather_object

    gathered: list[Any] = gather_object(items)
    return gathered


def _assemble(rows: list[_Row], task: Task, order: list[int]) -> Evaluation:
    """Return what the batches gave, in the order of the split; `order` is the one they were made in."""
    ordered = [row for _, row in sorted({row[0]: row for row in rows}.items())]
    losses_S = np.concatenate([row[1] for row in ordered])
    weights_S = np.concatenate([row[2] for row in ordered])
    if len(losses_S) != len(order):
        raise ValueError(f"task {task.name}: {len(losses_S)} losses for {len(order)} samples; is per_sample wrong?")
    predictions = [value for row in ordered for value in row[3]]
    references = [value for row in ordered for value in row[4]]
    found = Evaluation(losses_S, weights_S, predictions, references, task.metrics)
    return found.subset(np.argsort(order).tolist())


def _bar(batches: Iterator[Any], total: int, progress: bool, accelerator: Any) -> Any:
    if not progress or (accelerator is not None and not accelerator.is_main_process):
        return batches
    from tqdm import tqdm

    return tqdm(batches, total=total, desc="evaluating", unit="batch", leave=False, delay=2, disable=None)
