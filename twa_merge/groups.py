"""Parameter names -> groups: which parameters share one row of mixing weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from twa_merge.errors import UserError

if TYPE_CHECKING:
    from torch import nn

GRANULARITIES = ("model", "layer", "tensor")

Groups = dict[str, tuple[str, ...]]
"""Group name -> names of its parameters, both in the order of the model."""


def parameters_by_name(module: nn.Module, known: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    """Return each parameter of a module once: a tied one under the first of its names that is known, if any is."""
    names: dict[int, str] = {}
    found = dict(module.named_parameters(remove_duplicate=False))
    for name, parameter in found.items():
        held = names.setdefault(id(parameter), name)
        if known(name) and not known(held):
            names[id(parameter)] = name
    return {name: found[name] for name in names.values()}


def layer_of(name: str) -> str:
    """Return the layer a parameter belongs to.

    The layer is the path up to the first index (`bert.encoder.layer.3`, `transformer.h.0`, `layer1.0`), the
    embeddings as a whole (`bert.embeddings`), or else the module that owns the parameter (`classifier`).
    """
    path = name.split(".")
    for depth, part in enumerate(path):
        if part.isdigit():
            return ".".join(path[: depth + 1])
        if part.startswith("embed"):
            return ".".join(path[: depth + 1]) if depth + 1 < len(path) else name
    return ".".join(path[:-1]) or name


def group_parameters(names: Iterable[str], granularity: str | Sequence[str]) -> Groups:
    """Partition parameter names into groups.

    Args:
        names: parameter names in the order of the model.
        granularity: `model` (one group), `layer` (see `layer_of`), `tensor` (one group each), or shell patterns
            such as `["*embeddings*", "*.attention.*"]`: a parameter joins the first pattern that matches, and those
            that match none form the group `rest`.

    Raises:
        UserError: unknown granularity, or a pattern that no parameter joins.
    """
    if granularity == "model":
        return {"model": tuple(names)}
    if granularity == "layer":
        return _collect((layer_of(name), name) for name in names)
    if granularity == "tensor":
        return {name: (name,) for name in names}
    if isinstance(granularity, str) or not granularity:
        raise UserError(
            f"granularity: expected one of {', '.join(GRANULARITIES)} or a list of name patterns, got {granularity!r}"
        )
    groups = _collect((_first_match(name, granularity), name) for name in names)
    empty = [pattern for pattern in granularity if pattern not in groups]
    if empty:
        raise UserError(f"granularity: pattern {empty[0]!r} matches no parameter that an earlier pattern left over")
    return groups


def _first_match(name: str, patterns: Sequence[str]) -> str:
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), "rest")


def _collect(pairs: Iterable[tuple[str, str]]) -> Groups:
    groups: dict[str, list[str]] = {}
    for group, name in pairs:
        groups.setdefault(group, []).append(name)
    return {group: tuple(members) for group, members in groups.items()}
