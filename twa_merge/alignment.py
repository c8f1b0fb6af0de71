"""Which tensor of one checkpoint is which tensor of another: by name, or by the parameter both end up in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from twa_merge.errors import UserError
from twa_merge.names import NameMap, map_names, meta_module
from twa_merge.tensorfile import Entry, JoinedEntry, read_tensor

Header = dict[str, Entry]


@dataclass(frozen=True)
class SoupTensor:
    """One tensor of the merge: its name in the first checkpoint, and where each checkpoint keeps it."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def is_float(self) -> bool:
        return self.entries[0].dtype.is_floating_point


def align(headers: Sequence[Header], labels: Sequence[str], folders: Sequence[Path | None]) -> tuple[SoupTensor, ...]:
    """Find each tensor of the first checkpoint in all others: by its name, or by the parameter it ends up in.

    Raises:
        UserError: a tensor is missing in a checkpoint, or differs in shape or kind; both checkpoints are named.
    """
    tensors = _match(headers, labels, folders)
    for tensor in tensors:
        _check_fit(tensor, labels)
    return tensors


def _match(headers: Sequence[Header], labels: Sequence[str], folders: Sequence[Path | None]) -> tuple[SoupTensor, ...]:
    first = headers[0]
    if all(header.keys() == first.keys() for header in headers):
        return tuple(SoupTensor(name, tuple(header[name] for header in headers)) for name in first)
    if any(folder is None or not (folder / "config.json").is_file() for folder in folders):
        raise UserError(_missing(labels, [set(header) for header in headers]))
    maps = [map_names(meta_module(f), h) for f, h in zip(folders, headers, strict=True) if f]
    keyed = [_by_key(h, m, label) for h, m, label in zip(headers, maps, labels, strict=True)]
    if any(entries.keys() != keyed[0].keys() for entries in keyed):
        raise UserError(_missing(labels, [set(entries) for entries in keyed]))
    keys = {name: _key(name, maps[0]) for name in first}
    return tuple(
        SoupTensor(name, (first[name], *(entries[key] for entries in keyed[1:])))
        for name, key in keys.items()
        if key in keyed[0]
    )


def _key(name: str, names: NameMap) -> str:
    mapped = names.mapped.get(name)
    if mapped is None:
        return name
    return " + ".join(mapped.parameters) + (f" [{mapped.part}]" if mapped.part is not None else "")


def _by_key(header: Header, names: NameMap, label: str) -> Header:
    keyed: Header = {}
    for name, entry in header.items():
        key = _key(name, names)
        if key in keyed and not same_data(keyed[key], entry):
            raise UserError(untied(label, name))
        keyed.setdefault(key, entry)
    return keyed


def joined(name: str, parts: Sequence[SoupTensor], shape: tuple[int, ...]) -> SoupTensor:
    """Return several tensors, one after another, as the one of the module that they are parts of."""
    return SoupTensor(
        name, tuple(JoinedEntry.of(entries, shape) for entries in zip(*(p.entries for p in parts), strict=True))
    )


def untied(label: str, name: str) -> str:
    """Return the message for aliases of a tie that are not equal."""
    return f"{label}: {name!r} is tied to another tensor by the config, but differs from it on disk; which is right?"


def same_data(a: Entry, b: Entry) -> bool:
    """Whether two tensors on disk are equal; reads both."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(read_tensor(a), read_tensor(b))


def _missing(labels: Sequence[str], names: Sequence[set[str]]) -> str:
    for label, present in zip(labels[1:], names[1:], strict=True):
        for name in sorted(names[0] - present):
            return f"tensor {name!r} is in {labels[0]} but missing in {label}: checkpoints of one architecture expected"
        for name in sorted(present - names[0]):
            return f"tensor {name!r} is in {label} but missing in {labels[0]}: checkpoints of one architecture expected"
    raise AssertionError("no difference")


def _check_fit(tensor: SoupTensor, labels: Sequence[str]) -> None:
    first = tensor.entries[0]
    for label, entry in zip(labels[1:], tensor.entries[1:], strict=True):
        if entry.shape != first.shape:
            hint = " (another vocabulary or head?)" if entry.shape[1:] == first.shape[1:] else ""
            raise UserError(
                f"tensor {tensor.name!r} has shape {list(first.shape)} in {labels[0]} "
                f"but {list(entry.shape)} in {label}{hint}"
            )
        if entry.dtype.is_floating_point != first.dtype.is_floating_point:
            raise UserError(f"tensor {tensor.name!r} is {first.dtype} in {labels[0]} but {entry.dtype} in {label}")
