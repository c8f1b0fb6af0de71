"""Tasks that the user brings: preprocessing of their own for a transformers model, or any `nn.Module` at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from twa_merge.errors import UserError
from twa_merge.metrics import Metric, get_metric
from twa_merge.task_base import Batch, Task, logits_of, require_rows


def custom_task(
    preprocess: Callable[[Any, Path], Any], checkpoint: Path, *, metrics: Sequence[str | Metric] = ()
) -> Task:
    """Return the task of the `preprocess: package.module:function` hook.

    Args:
        preprocess: (raw split, checkpoint folder) -> features: a map-style dataset of dicts of what the model takes,
            labels included. If it has a `collate` attribute, that makes the batches, else transformers' default.
        checkpoint: folder of the first checkpoint.
        metrics: computed from the model's logits and `labels`, as of a single-label classification.

    The loss is the model's own, one value a batch.
    """
    collators: dict[str, Callable[[list[Any]], Batch]] = {}

    def prepare(dataset: Any) -> Any:
        features = preprocess(dataset, checkpoint)
        if features is None or not hasattr(features, "__getitem__"):
            raise UserError(
                f"preprocess: expected a dataset of features with a length and items, got {type(features).__name__}"
            )
        if hasattr(features, "collate"):
            collators["own"] = features.collate
        return require_rows(features)

    def collate(samples: list[Any]) -> Batch:
        if "own" in collators:
            return collators["own"](samples)
        from transformers import default_data_collator

        return dict(default_data_collator(samples))

    chosen = _metrics(metrics)
    return Task(
        name="custom",
        prepare=prepare,
        collate=collate,
        count=lambda batch: torch.tensor(float(batch_size_of(batch))),
        sample_losses=_own_loss,
        predictions=(lambda outputs, batch: _classes(logits_of(outputs), batch["labels"])) if chosen else None,
        metrics=chosen,
        per_sample=False,
    )


def module_task(
    loss: Callable[[Any, Any], Tensor] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    metrics: Sequence[str | Metric] | None = None,
) -> Task:
    """Return the task of any module; batches are dicts, or tuples (inputs..., targets).

    Args:
        loss: (outputs, targets) for tuples, (outputs, batch) for dicts -> mean loss. `F.cross_entropy` and
            `nn.CrossEntropyLoss` give a loss for each sample (from `batch["labels"]` for dicts), any other one value a
            batch. None: the module gets the whole batch and returns its loss.
        collate: list of samples -> batch; default torch's.
        metrics: default accuracy with a cross-entropy, else none. They need a cross-entropy with one class a sample.
    """
    cross_entropy = _cross_entropy_of(loss)
    chosen = _metrics(("accuracy",) if metrics is None and cross_entropy else metrics or ())
    if cross_entropy is None and any(not metric.from_loss for metric in chosen):
        raise UserError(
            f"metrics {', '.join(m.name for m in chosen)}: need a cross-entropy loss to know predictions and references"
        )
    common: dict[str, Any] = {
        "name": "module",
        "prepare": require_rows,
        "collate": collate or torch.utils.data.default_collate,
        "metrics": chosen,
    }
    if cross_entropy is not None:
        weigh = cross_entropy
        return Task(
            **common,
            count=lambda batch: weigh.weights(targets_of(batch)).sum(),
            sample_losses=lambda outputs, batch: weigh(logits_of(outputs), targets_of(batch)),
            predictions=lambda outputs, batch: _classes(logits_of(outputs), targets_of(batch)),
            forward=_call_with_inputs,
        )

    return Task(
        **common,
        count=lambda batch: torch.tensor(float(batch_size_of(batch))),
        sample_losses=lambda outputs, batch: _batch_loss(loss, outputs, batch),
        predictions=None,
        forward=_call_with_all if loss is None else _call_with_inputs_of_tuples,
        per_sample=False,
    )


class CrossEntropy:
    """Cross-entropy of each sample, weighed so that the weighted mean is what `F.cross_entropy` returns.

    Dense targets (segmentation) are averaged over the positions of a sample that are not ignored.
    """

    def __init__(self, weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        self.weight, self.ignore_index, self.label_smoothing = weight, ignore_index, label_smoothing

    def __call__(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss_B and weight_B of logits (B, C, ...) and targets (B, ...), or (B, C) probabilities."""
        raw = functional.cross_entropy(
            logits,
            targets,
            weight=None if self.weight is None else self.weight.to(logits),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        weight_B = self.weights(targets)
        loss_B = raw.flatten(1).sum(dim=1) if raw.dim() > 1 else raw
        return torch.where(weight_B > 0, loss_B / weight_B.clamp_min(1e-30), 0.0), weight_B

    def weights(self, targets: Tensor) -> Tensor:
        """Return weight_B: the class weights of each sample's targets, summed; 1 for probabilities."""
        if targets.is_floating_point():
            return torch.ones(len(targets), device=targets.device)
        counted = targets != self.ignore_index
        weight = counted.float()
        if self.weight is not None:
            classes = targets.masked_fill(~counted, 0)
            weight = weight * self.weight.to(targets.device).float()[classes]
        return weight.flatten(1).sum(dim=1) if weight.dim() > 1 else weight


def targets_of(batch: Any) -> Any:
    """Return the last element of a tuple, or `labels` of a dict."""
    if not isinstance(batch, Mapping):
        return batch[-1]
    if "labels" not in batch:
        raise UserError(f"batch: expected an entry `labels`, got {', '.join(map(str, batch))}")
    return batch["labels"]


def batch_size_of(batch: Any) -> int:
    """Return B: the length of the first tensor in a batch that has one."""
    pending = [batch]
    while pending:
        value = pending.pop(0)
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
        if isinstance(value, Mapping):
            pending = [*value.values(), *pending]
        elif isinstance(value, (list, tuple)):
            pending = [*value, *pending]
    raise UserError("batch: no tensor with samples in it; expected dicts or tuples of tensors")


def _cross_entropy_of(loss: Any) -> CrossEntropy | None:
    if loss is functional.cross_entropy:
        return CrossEntropy()
    if type(loss) is not nn.CrossEntropyLoss:
        return None
    if loss.reduction == "sum":
        raise UserError(
            "loss: expected a CrossEntropyLoss with reduction 'mean', got 'sum'; the mean is made exactly later"
        )
    return CrossEntropy(loss.weight, loss.ignore_index, loss.label_smoothing)


def _metrics(metrics: Sequence[str | Metric]) -> tuple[Metric, ...]:
    return tuple(metric if isinstance(metric, Metric) else get_metric(metric) for metric in metrics)


def _classes(logits: Tensor, targets: Tensor) -> tuple[list[Any], list[Any]]:
    if targets.dim() != 1 or logits.dim() != 2:
        raise UserError(
            f"metrics: expected one class a sample, got targets of shape {tuple(targets.shape)} and outputs of shape "
            f"{tuple(logits.shape)}; give metrics=()"
        )
    return logits.argmax(dim=1).tolist(), targets.tolist()


def _own_loss(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the loss in a module's outputs: themselves, `outputs["loss"]`, `outputs.loss` or `outputs[0]`."""
    if isinstance(outputs, Tensor):
        value: Any = outputs
    elif isinstance(outputs, Mapping):
        value = outputs.get("loss")
    elif hasattr(outputs, "loss"):
        value = outputs.loss
    else:
        value = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else None
    return _one_value(value, batch)


def _batch_loss(loss: Callable[[Any, Any], Tensor] | None, outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    if loss is None:
        return _own_loss(outputs, batch)
    return _one_value(loss(outputs, batch if isinstance(batch, Mapping) else targets_of(batch)), batch)


def _one_value(value: Any, batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"loss: expected one number a batch, got {got}; do the features have `labels`?")
    loss = value.float().reshape(1)
    return loss, torch.full_like(loss, float(batch_size_of(batch)), requires_grad=False)


def _call_with_inputs(module: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return module(**{name: value for name, value in batch.items() if name != "labels"})
    return _call_with_inputs_of_tuples(module, batch)


def _call_with_inputs_of_tuples(module: nn.Module, batch: Any) -> Any:
    return module(**batch) if isinstance(batch, Mapping) else module(*batch[:-1])


def _call_with_all(module: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, (tuple, list)) else module(batch)
