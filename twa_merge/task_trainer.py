"""What a trainer trains, as a task: losses that are known by the kind of model, or the trainer's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from twa_merge.errors import UserError
from twa_merge.evaluation import evaluation_mode
from twa_merge.memory import say
from twa_merge.metrics import get_metric
from twa_merge.random_numbers import fixed_random_numbers
from twa_merge.task_base import Batch, Task, require_rows, to_device, without_labels
from twa_merge.task_classification import classification_task
from twa_merge.task_custom import batch_size_of
from twa_merge.task_generation import IGNORED, logits_of_tokens, token_losses
from twa_merge.task_labels import SINGLE, LabelSpace
from twa_merge.tasks import guess_task

if TYPE_CHECKING:
    from transformers import Trainer


def trainer_task(trainer: Trainer, module: nn.Module) -> Task:
    """Return losses and metrics of what a trainer trains: a loss for each sample where the kind of model is known."""
    common: dict[str, Any] = {"prepare": require_rows, "collate": trainer.data_collator}
    config = getattr(module, "config", None)
    try:
        stock, name = config is not None and _has_stock_loss(trainer, module), type(module).__name__
        kind = None if not stock else "masked-lm" if name.endswith("ForMaskedLM") else guess_task([name])
    except UserError:
        kind = None
    if kind in ("text-classification", "image-classification"):
        labels = LabelSpace.of(config)
        accuracy = (get_metric("accuracy"),) if labels.problem == SINGLE else ()
        return classification_task(kind, labels, require_rows, trainer.data_collator, accuracy)
    if kind is not None:
        shift = 1 if kind == "causal-lm" else 0
        return Task(
            name=kind,
            count=lambda batch: (batch["labels"][:, shift:] != IGNORED).sum().float(),
            sample_losses=lambda outputs, batch: _token_losses(outputs, batch, shift),
            predictions=None,
            metrics=(get_metric("perplexity"),),
            forward=without_labels if shift else lambda module, batch: module(**batch),
            **common,
        )
    return Task(
        name="trainer",
        count=lambda batch: torch.tensor(float(batch_size_of(batch))),
        sample_losses=_one_loss,
        predictions=None,
        forward=_loss_of(trainer),
        per_sample=False,
        **common,
    )


def _has_stock_loss(trainer: Any, module: nn.Module) -> bool:
    from transformers import Trainer

    own = type(trainer).compute_loss is not Trainer.compute_loss or trainer.compute_loss_func is not None
    forward = inspect.unwrap(type(module).forward)
    own = own or not forward.__module__.startswith("transformers.") or hasattr(module, "_loss_function")
    return not own and trainer.label_smoother is None


def require_labels(batch: Batch) -> None:
    """Raise if a batch of a known kind of model has nothing to learn from or decide by."""
    if "labels" not in batch:
        raise UserError(
            f"finish: expected 'labels' in the batches of the trainer's eval_dataset, got {', '.join(batch)}; add "
            "them, or let the data_collator do so"
        )


def warn_unless_mean(task: Task, module: nn.Module, dataset: Any, trainer: Trainer) -> None:
    """Say so if the loss of a few samples is not the mean of theirs: candidates are scored sample by sample."""
    rows = [dataset[i] for i in range(min(4, len(dataset)))]

    def loss(samples: list[Any]) -> float:
        return float(task.forward(module, to_device(task.collate(samples), trainer.accelerator.device)))

    with torch.no_grad(), evaluation_mode(module), fixed_random_numbers():
        whole, each = loss(rows), [loss([row]) for row in rows]
    each = [value for value in each if math.isfinite(value)]  # there may be samples without a label
    low, high = min(each, default=whole), max(each, default=whole)
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

    one, two = batch(), batch()
    if not isinstance(one, Mapping):
        return
    if any(isinstance(value, Tensor) and not torch.equal(value, two[name]) for name, value in one.items()):
        raise UserError(
            "finish: batches of the same samples differ from one time to the next, so that candidates would be "
            "compared on different ones: the data_collator draws from a generator of its own; give it no seed"
        )


def _one_loss(loss: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.numel() and (labels == IGNORED).all():
        return torch.zeros(1, device=loss.device), torch.zeros(1, device=loss.device)  # a mean of nothing is NaN
    return loss.float().reshape(1), torch.full((1,), float(batch_size_of(batch)), device=loss.device)
