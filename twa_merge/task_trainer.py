"""What a trainer trains, as a task: losses that are known by the kind of model, or the trainer's own."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from twa_merge.errors import UserError
from twa_merge.evaluation import evaluation_mode
from twa_merge.memory import say
from twa_merge.metrics import get_metric
from twa_merge.random_numbers import fixed_random_numbers
from twa_merge.task_base import IGNORED, Batch, Task, call_module, difference, require_rows, to_device, without_labels
from twa_merge.task_classification import classification_task
from twa_merge.task_custom import batch_size_of
from twa_merge.task_generation import logits_of_tokens, token_losses
from twa_merge.task_labels import SINGLE, LabelSpace
from twa_merge.tasks import guess_task

if TYPE_CHECKING:
    from transformers import Trainer

Collate = Callable[[list[Any]], Batch]
_TRIED = 16
"""Samples among which those with a label are looked for."""


def trainer_task(trainer: Trainer, module: nn.Module, collate: Collate, dataset: Any) -> Task:
    """Return losses and metrics of what a trainer trains.

    A loss for each sample where the kind of model is known, and its mean over a few samples is the model's own loss of
    them; else the trainer's loss, scored sample by sample.

    Args:
        collate: makes the trainer's batches.
        dataset: samples to try.
    """
    if getattr(module, "config", None) is not None and _has_stock_loss(trainer, module):
        kind = _kind_of(module)
        task = None if kind is None else _tried(kind, trainer, module, collate, dataset)
        if task is not None:
            return task
    return Task(
        name="trainer",
        prepare=require_rows,
        collate=collate,
        count=_labelled,
        sample_losses=_one_loss,
        predictions=None,
        forward=_loss_of(trainer),
        per_sample=False,
    )


def _kind_of(module: nn.Module) -> str | None:
    name = type(module).__name__
    if name.endswith("ForMaskedLM"):
        return "masked-lm"
    try:
        return guess_task([name])
    except UserError:
        return None


def _tried(kind: str, trainer: Any, module: Any, collate: Collate, dataset: Any) -> Task | None:
    """Return the task of a kind of model, or None where it gives another loss than the model itself."""
    task, fits = None, True
    size = min(2, trainer.args.eval_batch_size)  # logits may be large
    with _scoring(trainer, module):
        for first in range(0, min(_TRIED, len(dataset)), size):
            rows = [dataset[i] for i in range(first, min(first + size, len(dataset)))]
            batch = _on_its_device(module, collate(rows))
            require_labels(batch)
            # what routers of experts add to it balances them in training, and says nothing of a merge
            routers = {"output_router_logits": False} if getattr(module.config, "output_router_logits", False) else {}
            found = module(**batch, **routers)  # with labels, the model also finds its problem_type
            own = float(found["loss"] if isinstance(found, Mapping) else found[0])
            task = _task_of(kind, module.config, collate)
            if math.isfinite(own):  # else none of these rows has a label
                fits = _is_loss_of(task, module, batch, own, len(rows))
                break
    if trainer.accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        fits = all(gather_object([fits]))  # of data that are drawn at random each has seen its own
    if fits:
        return task
    say(
        f"{type(module).__name__}: its loss here is not that of {kind}; it is taken as it is, sample by sample",
        main_process=trainer.is_world_process_zero(),
    )
    return None


def _is_loss_of(task: Task, module: nn.Module, batch: Batch, own: float, samples: int) -> bool:
    outputs = task.forward(module, batch)
    try:
        losses, weights = task.sample_losses(outputs, batch)
    except (IndexError, RuntimeError, ValueError):  # of shapes that this kind does not have
        return False
    if len(losses) != samples:
        return False
    logits = logits_of_tokens(outputs)
    # transformers takes some losses on logits as they are, of few bits
    rounding = 4 * torch.finfo(logits.dtype).eps * max(1.0, float(logits.abs().max()))
    return math.isclose(own, float((losses * weights).sum() / weights.sum()), rel_tol=1e-3, abs_tol=rounding)


def _on_its_device(module: nn.Module, batch: Batch) -> Batch:
    parameter = next(module.parameters(), None)
    return batch if parameter is None else to_device(batch, parameter.device)


@contextlib.contextmanager
def _scoring(trainer: Any, module: nn.Module) -> Iterator[None]:
    """Run a module as it is scored: in the trainer's precision, without gradients, on the same random numbers."""
    with torch.no_grad(), evaluation_mode(module), fixed_random_numbers(), trainer.compute_loss_context_manager():
        yield


def _task_of(kind: str, config: Any, collate: Collate) -> Task:
    if kind in ("text-classification", "image-classification"):
        labels = LabelSpace.of(config)
        accuracy = (get_metric("accuracy"),) if labels.problem == SINGLE else ()
        return classification_task(kind, labels, require_rows, collate, accuracy)
    shift = 1 if kind == "causal-lm" else 0
    return Task(
        name=kind,
        prepare=require_rows,
        collate=collate,
        count=lambda batch: (batch["labels"][:, shift:] != IGNORED).sum().float(),
        sample_losses=lambda outputs, batch: _token_losses(outputs, batch, shift),
        predictions=None,
        metrics=(get_metric("perplexity"),),
        # a decoder's input is made of the labels
        forward=call_module if kind == "seq2seq" else without_labels,
    )


def _has_stock_loss(trainer: Any, module: nn.Module) -> bool:
    from transformers import Trainer

    own = type(trainer).compute_loss is not Trainer.compute_loss or trainer.compute_loss_func is not None
    forward = inspect.unwrap(type(module).forward)
    own = own or not (forward.__module__ or "").startswith("transformers.") or hasattr(module, "_loss_function")
    return not own and trainer.label_smoother is None


def require_labels(batch: Mapping[str, Any]) -> None:
    """Raise if a batch of a known kind of model has nothing to learn from or decide by."""
    if "labels" not in batch:
        raise UserError(
            f"finish: expected 'labels' in the batches of the trainer's eval_dataset, got {', '.join(batch)}; add "
            "them, or let the data_collator do so"
        )


def check_mean(task: Task, module: nn.Module, dataset: Any, trainer: Trainer) -> None:
    """Say so if the loss of a few samples is not the mean of theirs: candidates are scored sample by sample.

    Raises:
        UserError: the loss of a sample alone is the same for all, as contrastive ones are.
    """

    def loss(samples: list[Any]) -> float:
        return float(task.forward(module, _on_its_device(module, task.collate(samples))))

    with _scoring(trainer, module):
        rows = [dataset[i] for i in range(min(4, len(dataset)))]
        whole, each = loss(rows), [loss([row]) for row in rows]
    if not math.isfinite(whole):
        return  # none of them has a label
    each = [value for value in each if math.isfinite(value)]
    low, high = min(each, default=whole), max(each, default=whole)
    alike = len(each) > 1 and math.isclose(low, high, rel_tol=1e-6, abs_tol=1e-9)
    if alike and not math.isclose(whole, low, rel_tol=1e-3, abs_tol=1e-6):
        raise UserError(
            f"finish: the trainer's loss of any one sample alone is {low:.4g}, of {len(rows)} together {whole:.4g}: a "
            "loss of whole batches, by which merges cannot be compared sample by sample; pass task= with a loss for "
            "each sample"
        )
    # weighted means, of samples with unequal numbers of labels, lie between
    if not low - 0.01 * abs(low) <= whole <= high + 0.01 * abs(high):
        say(
            f"warning: the trainer's loss of {len(rows)} samples together, {whole:.4g}, is none of a mean of theirs, "
            f"{low:.4g} to {high:.4g}: candidates are scored sample by sample, which may mean little; pass task=",
            main_process=trainer.is_world_process_zero(),
        )


def _token_losses(outputs: Any, batch: Batch, shift: int) -> tuple[Tensor, Tensor]:
    logits, labels = logits_of_tokens(outputs), batch["labels"]
    return token_losses(logits[:, : logits.shape[1] - shift], labels[:, shift:])


def _loss_of(trainer: Any) -> Callable[[nn.Module, Batch], Any]:
    # a copy: with label smoothing, Trainer takes the labels out of the batch
    return lambda module, batch: trainer.compute_loss(module, dict(batch))


def require_same_batches(collate: Callable[[list[Any]], Batch], dataset: Any) -> None:
    """Raise if batches of the same samples differ: candidates would be compared on different ones."""

    def batch() -> Batch:
        with fixed_random_numbers():
            return collate([dataset[i] for i in range(min(4, len(dataset)))])

    where = difference(batch(), batch())
    if where is not None:
        raise UserError(
            f"finish: batches of the same samples differ from one time to the next{where and f' ({where})'}, so that "
            "candidates would be compared on different ones: the data set or the data_collator draws from a generator "
            "of its own; give it no seed"
        )


def _labelled(batch: Batch) -> Tensor:
    """Return how many samples of a batch have a label."""
    size = batch_size_of(batch)
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or not labels.numel()
        or labels.shape[:1] != (size,)
    ):
        return torch.tensor(float(size))
    return (labels != IGNORED).reshape(size, -1).any(dim=1).sum().float()


def _one_loss(loss: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    count = _labelled(batch).to(loss.device)
    # a mean over no label is NaN
    return torch.where(count > 0, loss.float(), 0).reshape(1), count.reshape(1)
