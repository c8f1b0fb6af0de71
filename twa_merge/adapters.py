"""Adapters of PEFT: the full model that a base and its adapter are together."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a `PeftModel`; does not import PEFT."""
    return any(cls.__name__ == "PeftModel" and cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def without_adapters(model: Any) -> nn.Module:
    """Return a full model of its own, with the active adapters merged in; the given one stays as it is."""
    merged: nn.Module = copy.deepcopy(model).merge_and_unload()
    return merged


@contextlib.contextmanager
def merged_adapters(model: Any) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """Yield the base model and the state dict that it has with the active adapters merged in.

    Afterwards the base has the weights it had before, exactly: taking a merge back would leave its rounding in them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base: nn.Module = model.get_base_model()
    tuned = {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
    wrapped = {name: layer for name, layer in base.named_modules() if isinstance(layer, AuxiliaryTrainingWrapper)}
    before = [(p, p.detach().clone()) for layer in tuned.values() for p in layer.get_base_layer().parameters()]
    model.merge_adapter()
    try:
        _untie(base)
        state = base.state_dict(keep_vars=True)
        yield base, {new: state[name] for name in state if (new := _plain_name(name, tuned, wrapped)) is not None}
    finally:
        model.unmerge_adapter()
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


def _untie(base: Any) -> None:
    """Let the config say that input and output embeddings differ, if one of them alone is trained (as PEFT does when it
    unloads): else the saved model would be tied again when it is loaded."""
    if not getattr(getattr(base, "config", None), "tie_word_embeddings", False):
        return
    read, written = (getattr(p, "weight", None) for p in (base.get_input_embeddings(), base.get_output_embeddings()))
    if isinstance(read, Tensor) and isinstance(written, Tensor) and read.data_ptr() != written.data_ptr():
        base.config.tie_word_embeddings = False


def _plain_name(name: str, tuned: dict[str, Any], wrapped: dict[str, Any]) -> str | None:
    """Return a tensor's name in the base without adapters; None if it belongs to an adapter."""
    for path, layer in wrapped.items():
        if name.startswith(path + "."):
            active = f"{path}.modules_to_save.{layer.active_adapters[0]}."
            return f"{path}.{name.removeprefix(active)}" if name.startswith(active) else None
    for path in tuned:
        if name.startswith(path + "."):
            inner = f"{path}.base_layer."
            return f"{path}.{name.removeprefix(inner)}" if name.startswith(inner) else None
    return name
