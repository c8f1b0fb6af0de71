"""Dropout is off while coefficients learn: a few numbers need no regularising noise, and it biases their gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def switch_off_dropout(module: nn.Module) -> dict[tuple[int, str], tuple[Any, str, float]]:
    """Set every dropout and layer-drop rate of a module to zero and return what `restore_dropout` needs.

    Attention reads its rate functionally, from a float attribute of the module or of its config, so setting
    `nn.Dropout.p` alone leaves dropout on.
    """
    saved = {}
    for owner in _owners(module):
        for name, value in list(vars(owner).items()):
            if isinstance(value, float) and value > 0 and _is_rate(owner, name):
                saved[id(owner), name] = (owner, name, value)
                setattr(owner, name, 0.0)
    return saved


def restore_dropout(saved: dict[tuple[int, str], tuple[Any, str, float]]) -> None:
    """Put back the rates that `switch_off_dropout` took away."""
    for owner, name, value in saved.values():
        setattr(owner, name, value)


def _is_rate(owner: Any, name: str) -> bool:
    if name == "p":
        return "drop" in type(owner).__name__.lower() or "StochasticDepth" in type(owner).__name__
    return "drop" in name or name.endswith("pdrop")


def _owners(module: nn.Module) -> Iterator[Any]:
    seen = set()
    for inner in module.modules():
        yield inner
        config = getattr(inner, "config", None)
        if config is not None and hasattr(config, "__dict__") and id(config) not in seen:
            seen.add(id(config))
            yield config
