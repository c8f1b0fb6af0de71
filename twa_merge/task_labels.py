"""Labels of a classification or regression: what the checkpoint calls them, how data give them, and their loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from twa_merge.errors import UserError
from twa_merge.task_base import IGNORED, Batch, column_values, logits_of

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE, MULTI, REGRESSION)


@dataclass(frozen=True)
class LabelSpace:
    """The labels a checkpoint knows.

    Legend: B samples in a batch, C classes (or targets of a regression).
    """

    problem: str
    """One of `PROBLEM_TYPES`."""
    names: tuple[str, ...]
    """C names, in the order of the logits."""

    @classmethod
    def of(cls, config: Any, problem_type: str | None = None) -> LabelSpace:
        """Return the labels of a transformers config; `problem_type` overrides what it says."""
        problem = problem_type or config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE)
        if problem not in PROBLEM_TYPES:
            raise UserError(f"problem_type: expected {', '.join(PROBLEM_TYPES)}, got {problem!r}")
        if problem != REGRESSION and config.num_labels < 2:
            raise UserError(f"problem_type: {problem} needs at least 2 labels, the checkpoint has {config.num_labels}")
        return cls(problem, tuple(str(config.id2label[i]) for i in range(config.num_labels)))

    @property
    def named(self) -> bool:
        """Whether the names mean something; LABEL_0, LABEL_1, ... are transformers' default."""
        return self.names != tuple(f"LABEL_{i}" for i in range(len(self.names)))

    def read(self, dataset: Any, column: str) -> list[Any]:
        """Return a column as labels: S class numbers, or S lists of C floats, or S floats.

        Raises:
            UserError: a label is missing, unknown or out of range, or the classes are in another order.
        """
        _check_class_order(self, dataset.features[column], column)
        convert = {SINGLE: self._class, MULTI: self._flags, REGRESSION: self._targets}[self.problem]
        values = column_values(dataset, column)
        if self.problem == MULTI and _are_flags(values, len(self.names)):
            return [[float(flag) for flag in value] for value in values]
        return [convert(value, f"column {column!r}, row {row}") for row, value in enumerate(values)]

    def tensor(self, labels: Sequence[Any]) -> Tensor:
        """Return labels as the model wants them: int64 (B,), or float32 (B, C) or (B,)."""
        return torch.tensor(labels, dtype=torch.int64 if self.problem == SINGLE else torch.float32)

    def sample_losses(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the losses (B,) that transformers' classification heads average, and weights: zero without a label."""
        logits_BC, labels = logits_of(outputs), batch["labels"]
        if self.problem == SINGLE:
            classes_B = labels.reshape(-1)
            loss_B = functional.cross_entropy(logits_BC, classes_B, reduction="none", ignore_index=IGNORED)
            return loss_B, (classes_B != IGNORED).to(loss_B)
        if self.problem == MULTI:
            loss_B = functional.binary_cross_entropy_with_logits(logits_BC, labels, reduction="none").mean(dim=1)
        else:
            loss_B = (logits_BC - labels.reshape(logits_BC.shape)).square().mean(dim=1)
        return loss_B, torch.ones_like(loss_B)

    def count(self, batch: Batch) -> Tensor:
        """Return how many samples of a batch have a label, as a 0-d float."""
        labels = batch["labels"]
        return (labels != IGNORED).sum().float() if self.problem == SINGLE else torch.tensor(float(len(labels)))

    def predictions(self, outputs: Any, batch: Batch) -> tuple[list[Any], list[Any]]:
        """Return B predictions and references: class numbers, lists of C zeros and ones, or numbers."""
        logits_BC, labels = logits_of(outputs), batch["labels"]
        if self.problem == SINGLE:
            return logits_BC.argmax(dim=1).tolist(), labels.reshape(-1).tolist()
        if self.problem == MULTI:
            return (logits_BC > 0).int().tolist(), labels.round().int().tolist()
        return logits_BC.reshape(labels.shape).tolist(), labels.tolist()

    def _class(self, value: Any, where: str) -> int:
        if value is None:
            raise UserError(f"{where}: no label; remove or fill that row")
        if isinstance(value, (list, dict)):
            raise UserError(
                f"{where}: expected one label, got a {type(value).__name__}; for several labels a sample set "
                f"problem_type to {MULTI}"
            )
        if isinstance(value, str):
            return self._named_class(value, where)
        if isinstance(value, float) and not value.is_integer():
            raise UserError(
                f"{where}: expected a class number, got {value}; for a regression set problem_type to {REGRESSION}"
            )
        if not 0 <= value < len(self.names):
            hint = "; -1 often marks a split without labels" if value == -1 else ""
            raise UserError(
                f"{where}: label {int(value)} is out of range; the checkpoint has {len(self.names)} labels, "
                f"0 to {len(self.names) - 1}{hint}"
            )
        return int(value)

    def _named_class(self, value: str, where: str) -> int:
        if value in self.names:
            return self.names.index(value)
        if not self.named and value.isdigit():
            return self._class(int(value), where)
        raise UserError(
            f"{where}: the checkpoint has no label {value!r}; it has {_shown(self.names)}: rename the label, "
            "or give class numbers"
        )

    def _flags(self, value: Any, where: str) -> list[float]:
        if not isinstance(value, list):
            raise UserError(
                f"{where}: expected a list of labels, got {value!r}; for one label set problem_type to {SINGLE}"
            )
        if any(isinstance(item, float) for item in value):
            if len(value) != len(self.names) or not all(0 <= item <= 1 for item in value):
                raise UserError(f"{where}: expected {len(self.names)} numbers between 0 and 1, got {str(value)[:80]}")
            return [float(item) for item in value]
        flags = [0.0] * len(self.names)
        for item in value:
            flags[self._class(item, where)] = 1.0
        return flags

    def _targets(self, value: Any, where: str) -> float | list[float]:
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(n, (str, bool)) or n is None or not math.isfinite(n) for n in numbers):
            raise UserError(f"{where}: expected a number to regress, got {value!r}")
        if len(numbers) != len(self.names):
            raise UserError(f"{where}: expected {len(self.names)} numbers, one for each output, got {len(numbers)}")
        return float(numbers[0]) if len(numbers) == 1 else [float(n) for n in numbers]


def _are_flags(values: Sequence[Any], num_labels: int) -> bool:
    """Whether every row is a list of `num_labels` zeros and ones (and not of label numbers)."""
    return all(isinstance(v, list) and len(v) == num_labels and all(item in (0, 1) for item in v) for v in values)


def _check_class_order(space: LabelSpace, feature: Any, column: str) -> None:
    feature = getattr(feature, "feature", feature)  # a list of class labels
    names = getattr(feature, "names", None)
    if names is None or not space.named or space.problem == REGRESSION:
        return
    known = {name.lower(): i for i, name in enumerate(space.names)}
    common = [i for i, name in enumerate(names) if name.lower() in known]
    if any(known[names[i].lower()] != i for i in common):
        raise UserError(
            f"column {column!r}: its classes are in another order than the checkpoint's: data {_shown(names)}, "
            f"checkpoint {_shown(space.names)}; reorder them with "
            f"dataset.align_labels_with_mapping(label2id, {column!r})"
        )
    if not common:
        warnings.warn(
            f"column {column!r}: classes are matched by number, as their names differ: data {_shown(names)}, "
            f"checkpoint {_shown(space.names)}",
            stacklevel=2,
        )


def _shown(names: Sequence[str]) -> str:
    text = ", ".join(names[:12])
    return f"[{text}, ... {len(names)} in all]" if len(names) > 12 else f"[{text}]"
