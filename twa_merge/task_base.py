"""What every task has: its record, and the columns, rows and batches that all of them handle alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twa_merge.errors import UserError
from twa_merge.metrics import Metric

Batch = dict[str, Any]
"""What `module(**batch)` gets (any other structure of tensors for `module_task`)."""

IGNORED = -100
"""The label of what counts nothing, as everywhere in transformers."""

Layouts = Sequence[Mapping[str, str]]
"""Guesses, best first: which column plays which role."""


def call_module(module: nn.Module, batch: Batch) -> Any:
    """Return the module's outputs for a whole batch."""
    return module(**batch)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What learning and scoring need to know about a problem."""

    name: str
    prepare: Callable[[Any], Any]
    """Raw split -> map-style dataset of features; raises UserError where the data do not fit the task."""
    collate: Callable[[list[Any]], Batch]
    count: Callable[[Batch], Tensor]
    """Number of label elements of a batch, 0-d float32: the sum of the weights of `sample_losses`, but known before
    the forward pass, so that accumulated gradients and several processes weigh exactly."""
    sample_losses: Callable[[Any, Batch], tuple[Tensor, Tensor]]
    """(outputs, batch) -> loss_B and weight_B, float32; the loss of the batch is sum(l * w) / sum(w)."""
    predictions: Callable[[Any, Batch], tuple[list[Any], list[Any]]] | None
    """(outputs, batch) -> B predictions and B references: plain numbers, lists or strings."""
    generate: Callable[[nn.Module, Batch], tuple[list[Any], list[Any]]] | None = None
    """(module, batch) -> B generated texts and B reference texts, for metrics that need text."""
    metrics: tuple[Metric, ...] = ()
    forward: Callable[[nn.Module, Batch], Any] = call_module
    per_sample: bool = True
    """False where the loss comes as one value a batch, (1,); such a task is evaluated sample by sample."""


def without_labels(module: nn.Module, batch: Batch) -> Any:
    """Return the module's outputs; the task computes the loss, so the module need not do so as well."""
    return module(**{name: value for name, value in batch.items() if name != "labels"})


def difference(one: Any, other: Any) -> str | None:
    """Return where two batches hold other values: a key, an empty string where there are no keys, or None if nowhere.

    Tensors count, however nested in mappings and sequences.
    """
    if isinstance(one, Tensor):
        same = torch.equal(one, other)
        if not same and one.is_floating_point() and one.shape == other.shape:
            same = torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
        return None if same else ""
    if isinstance(one, Mapping):
        return next((str(key) for key in one if key not in other or difference(one[key], other[key]) is not None), None)
    if isinstance(one, (tuple, list)):
        pairs = zip(one, other, strict=False)
        return "" if len(one) != len(other) or any(difference(*pair) is not None for pair in pairs) else None
    return None


def logits_of(outputs: Any) -> Tensor:
    """Return the logits of a ModelOutput, dict, tuple or plain tensor, as float32."""
    if isinstance(outputs, Tensor):
        logits = outputs
    elif isinstance(outputs, (tuple, list)):
        logits = outputs[0]
    else:
        logits = outputs["logits"]
    return logits.float()


def to_device(batch: Any, device: Any) -> Any:
    """Return a batch with all tensors in it, however nested, on `device`."""
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)


def require_rows(dataset: Any) -> Any:
    """Return the dataset if it has a length and rows.

    Raises:
        UserError: it is empty, or a stream.
    """
    if not hasattr(dataset, "__len__"):
        raise UserError(
            f"data: expected a dataset with a length, got {type(dataset).__name__}; streams are not supported"
        )
    if len(dataset) == 0:
        raise UserError("data: the dataset is empty; expected at least one row")
    return dataset


def plain_rows(dataset: Any, columns: Mapping[str, str]) -> Any:
    """Return a `datasets.Dataset` with rows, in Python format; flattened if a named column (`translation.en`) asks."""
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise UserError(
            f"data: expected a datasets.Dataset, got {type(dataset).__name__}; open it with open_split first"
        )
    dataset = require_rows(dataset).with_format(None)
    if any("." in name and name not in dataset.column_names for name in columns.values()):
        dataset = dataset.flatten()
    return dataset


def find_columns(dataset: Any, layouts: Layouts, named: Mapping[str, str], *, what: str) -> dict[str, str]:
    """Return role -> column: the named ones where any is named, else the first layout that the data have.

    Args:
        dataset: a `datasets.Dataset`.
        layouts: a role that all of them have is required.
        named: role -> column as the user says; roles of other layouts are ignored.
        what: of the task, for messages.
    """
    roles = list(dict.fromkeys(role for layout in layouts for role in layout))
    chosen = {role: named[role] for role in roles if role in named}
    present = f"the data have the columns {', '.join(dataset.column_names)}"
    for role, column in chosen.items():
        if column not in dataset.column_names:
            raise UserError(f"{what}: no column {column!r} for {role}; {present}")
    if chosen:
        missing = [role for role in roles if role not in chosen and all(role in layout for layout in layouts)]
        if missing:
            raise UserError(f"{what}: no column named for {missing[0]}; {present}; name it as `columns.{missing[0]}`")
        return chosen
    for layout in layouts:
        if all(column in dataset.column_names for column in layout.values()):
            return dict(layout)
    known = " or ".join("+".join(layout.values()) for layout in layouts)
    raise UserError(
        f"{what}: no column found for {next(iter(layouts[0]))}; expected {known}; {present}; "
        f"name them as {', '.join(f'`columns.{role}`' for role in layouts[0])}"
    )


def check_column_roles(columns: Mapping[str, str], roles: Sequence[str], *, what: str) -> None:
    """Raise UserError for a named role that the task does not have."""
    for role in columns:
        if role not in roles:
            raise UserError(f"{what}: unknown column role {role!r}; expected one of {', '.join(roles)}")


def check_text(dataset: Any, column: str, *, what: str) -> None:
    """Raise UserError unless the column holds strings."""
    dtype = getattr(dataset.features[column], "dtype", None)
    if dtype not in ("string", "large_string"):
        got = dtype or type(dataset.features[column]).__name__
        raise UserError(
            f"{what}: column {column!r} holds {got}, expected text; the data have the columns "
            f"{', '.join(dataset.column_names)}"
        )


def check_tokens(rows: Sequence[Any], indices: Sequence[int], *, column: str, what: str) -> None:
    """Raise UserError naming the first row without a single token (or text)."""
    for row, index in zip(rows, indices, strict=True):
        if row is None or len(row) == 0:
            raise UserError(f"{what}: row {index} has no text in column {column!r}; remove or fill that row")


def column_values(dataset: Any, column: str) -> list[Any]:
    """Return one column as plain Python values, without decoding the others."""
    values: list[Any] = dataset.select_columns([column])[:][column]
    return values
