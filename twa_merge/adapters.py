"""Adapters of PEFT: the full model that a base and its adapter are together."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from twa_merge.errors import UserError


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a `PeftModel`; does not import PEFT."""
    return any(cls.__name__ == "PeftModel" and cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def check_adapters(module: nn.Module) -> None:
    """Raise if a module has adapters and its snapshots would not be the full model that trains.

    Raises:
        UserError: the adapters are transformers' own, cannot be merged into weights, or sit on tied weights.
    """
    if "peft" not in sys.modules:
        return
    if not is_adapted(module):
        if _tuned(module):
            raise UserError(
                "snapshots: the model's adapters were added by add_adapter; use peft.get_peft_model in its place"
            )
        return
    model: Any = module
    kind = getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type)
    if model.active_peft_config.is_prompt_learning:
        raise UserError(f"snapshots: {kind} adds inputs to a model and no weights, so that there is nothing to merge")
    base: nn.Module = model.get_base_model()
    tied = _tied_and_tuned(base)
    if tied is not None:
        raise UserError(
            f"snapshots: the adapter changes {tied!r}, whose weight is tied to another place: merged, it would change "
            "both; leave it out of target_modules"
        )
    missing = _plain_names(base) - {_plain_name(name, base) for name in base.state_dict()}
    if missing:
        raise UserError(
            f"snapshots: {kind} keeps {min(missing)!r} in a way that is not supported; save checkpoints of the adapter "
            "and merge each into its base (merge_and_unload)"
        )


def without_adapters(model: Any) -> nn.Module:
    """Return a full model of its own, with the active adapters merged in; the given one stays as it is."""
    merged: nn.Module = copy.deepcopy(model).merge_and_unload()
    return merged


@contextlib.contextmanager
def full_model(model: Any) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Yield a model and its state dict; of one with adapters the base, with the active adapters merged in.

    Afterwards the base has the weights it had before, exactly: taking a merge back would leave its rounding in them.
    """
    if not is_adapted(model):
        yield model, model.state_dict(keep_vars=True)
        return
    base: nn.Module = model.get_base_model()
    changed = {id(p): p for layer in _tuned(base).values() for p in layer.get_base_layer().parameters()}
    before = [(p, p.detach().clone()) for p in changed.values()]
    model.merge_adapter()
    try:
        state = base.state_dict(keep_vars=True)
        plain = {new: state[name] for name in state if (new := _plain_name(name, base)) is not None}
        _untie(base, plain)
        yield base, plain
    finally:
        model.unmerge_adapter()
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


def _tuned(base: nn.Module) -> dict[str, Any]:
    """Return the layers that adapters have replaced."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}


def _tied_and_tuned(base: nn.Module) -> str | None:
    """Return the name of a layer whose weight an adapter changes and another module reads, or None."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    places: dict[int, int] = {}
    for layer in {id(m): m for m in base.modules()}.values():
        for parameter in layer.parameters(recurse=False):
            places[id(parameter)] = places.get(id(parameter), 0) + 1
    for name, layer in _tuned(base).items():
        weight = getattr(layer.get_base_layer(), "weight", None)
        # new tokens are put in place, not added, and PEFT puts them into both
        if places.get(id(weight), 0) > 1 and not isinstance(layer, TrainableTokensLayer):
            return name
    return None


def _untie(base: Any, plain: dict[str, Tensor]) -> None:
    """Let the config say that input and output embeddings differ, if one of them alone is trained (as PEFT does when it
    unloads): else the saved model would be tied again when it is loaded."""
    if not getattr(getattr(base, "config", None), "tie_word_embeddings", False):
        return
    names = {id(module): name for name, module in base.named_modules()}
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    read, written = (plain.get(f"{names.get(id(end))}.weight") for end in ends)
    if read is not None and written is not None and read.data_ptr() != written.data_ptr():
        base.config.tie_word_embeddings = False


def _plain_name(name: str, base: nn.Module) -> str | None:
    """Return a tensor's name in the base without adapters; None if it belongs to an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    at: Any = base
    kept, left = [], name.split(".")
    while left:
        if isinstance(at, BaseTunerLayer):  # others may lie inside
            if left[0] != "base_layer":
                return None
            skipped = 1
        elif isinstance(at, AuxiliaryTrainingWrapper):
            if left[0] == "token_adapter":
                skipped = 1
            elif left[:2] == ["modules_to_save", at.active_adapters[0]]:
                skipped = 2
            else:
                return None
        else:
            kept.append(left[0])
            skipped = 1
        for part in left[:skipped]:
            at = getattr(at, part)
        left = left[skipped:]
    return ".".join(kept)


def _plain_names(base: Any) -> set[str]:
    """Return the names of a transformers model's parameters as its config says; none of other modules."""
    from transformers import PreTrainedModel

    if not isinstance(base, PreTrainedModel):
        return set()
    with torch.device("meta"):
        fresh = type(base)(copy.deepcopy(base.config))
    return {name for name, _ in fresh.named_parameters()}
