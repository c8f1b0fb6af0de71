"""Names on disk -> names in the module: renamings, conversions on load and ties, by transformers' own tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twa_merge.errors import UserError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Mapped:
    """Where a tensor on disk ends up in the module."""

    parameters: tuple[str, ...]
    """Names of parameters or buffers in the module, usually one; an alias of a tie is replaced by its source."""
    part: str | None
    """None: the tensor on disk *is* the parameter, renamed at most. Otherwise which part of a converted parameter it
    is (fused experts, split qkv), by a name that does not depend on the spelling on disk."""
    place: tuple[int, int] | None = None
    """Its place among the parts, where the parameter is nothing but its parts one after another."""


_Loaded = tuple[tuple[str, ...], str | None, tuple[int, int] | None]


@dataclass(frozen=True)
class NameMap:
    """What `from_pretrained` would do with every tensor of a checkpoint."""

    mapped: Mapping[str, Mapped]
    """Name on disk -> where it ends up; a name is either here or in `unused`."""
    unused: tuple[str, ...]
    """Names on disk that `from_pretrained` would ignore."""
    parameters: tuple[str, ...]
    """Float parameters of the module in its order, each storage once, by its canonical name; not what it computes."""
    buffers: tuple[str, ...]
    """Persistent buffers of the module."""
    ties: Mapping[str, str]
    """Alias -> canonical name of the same storage."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the float parameters."""


def map_names(module: nn.Module, disk_names: Iterable[str]) -> NameMap:
    """Work out from names alone which parameter each tensor on disk is loaded into.

    Args:
        module: the model, on any device; `meta_module` makes one without memory.
        disk_names: names of the tensors in the checkpoint, in any order.

    Raises:
        UserError: a parameter is on disk both whole and in parts.
    """
    names = list(disk_names)
    ties = _ties(module)
    loaded = _load(module, names)
    mapped = {
        name: Mapped(tuple(dict.fromkeys(ties.get(target, target) for target in targets)), part, place)
        for name in names
        if name in loaded
        for targets, part, place in [loaded[name]]
    }
    persistent = module.state_dict(keep_vars=True).keys()
    computed: Iterable[str] = getattr(module, "_keys_to_ignore_on_save", None) or ()  # type: ignore[assignment]
    parameters = [(n, p) for n, p in module.named_parameters(remove_duplicate=False) if n not in computed]
    return NameMap(
        mapped=mapped,
        unused=tuple(name for name in names if name not in mapped),
        parameters=tuple(name for name, p in parameters if name not in ties and p.is_floating_point()),
        buffers=tuple(name for name, _ in module.named_buffers() if name in persistent),
        ties=ties,
        shapes={name: tuple(p.shape) for name, p in module.named_parameters() if p.is_floating_point()},
    )


def meta_module(config_folder: Path) -> nn.Module:
    """Build the model that `config.json` names in `architectures`, on the meta device, with its weights tied.

    Remote code is never run: the class has to be one of transformers' own.

    Raises:
        UserError: there is no readable config, or transformers has no such class.
    """
    cls = _model_class(Path(config_folder))
    try:
        config = cls.config_class.from_pretrained(config_folder)
        return meta_model(cls, config)
    except (ImportError, OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{config_folder}: cannot build {cls.__name__} from config.json ({reason}); "
            "check config.json, or upgrade transformers"
        ) from error


def meta_model(cls: Any, config: Any) -> nn.Module:
    """Return `cls(config)`, a transformers model, on the meta device with its weights tied."""
    import torch
    from transformers.initialization import meta_device_safe_creation_ops

    with torch.device("meta"), meta_device_safe_creation_ops():
        model: Any = cls(config)
    model.tie_weights()
    return model  # type: ignore[no-any-return]


def _model_class(folder: Path) -> Any:
    import transformers

    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        names = config.get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a readable config ({error}); save or download the checkpoint again") from error
    if not names:
        raise UserError(
            f"{path}: has no `architectures`, expected the name of a transformers class such as "
            "'BertForSequenceClassification'; add it"
        )
    cls = getattr(transformers, str(names[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise UserError(
            f"{path}: `architectures` names {names[0]!r}, which transformers {transformers.__version__} does not have "
            "(remote code is never run); expected one of its model classes: correct the name or upgrade transformers"
        )
    return cls


def _load(module: nn.Module, names: list[str]) -> dict[str, _Loaded]:
    """Follow `convert_and_load_state_dict_in_model` of transformers: name on disk -> `Mapped`, as plain values."""
    from transformers import PreTrainedModel

    state = module.state_dict(keep_vars=True)
    if not isinstance(module, PreTrainedModel):
        return {name: ((name,), None, None) for name in names if name in state}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(module)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix = module.base_model_prefix
    loaded: dict[str, _Loaded] = {}
    claimed: dict[str, tuple[str, str | None]] = {}
    position: Counter[tuple[str, str]] = Counter()
    # transformers' order: it numbers the experts, settles which of two spellings wins, and some renamings depend on it.
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if target not in state:
            continue
        other, other_pattern = claimed.setdefault(target, (name, pattern))
        if (pattern is None) != (other_pattern is None):
            raise UserError(
                f"parameter {target!r} is on disk twice, whole and in parts ({other!r}, {name!r}); remove one of them"
            )
        if pattern is None:
            if other == name:  # of two spellings the first is loaded, the other ignored
                loaded[name] = (target,), None, None
            continue
        number = position[target, pattern]
        position[target, pattern] += 1
        # Of several converters with the same pattern transformers uses the last.
        converter = next(c for c in reversed(converters) if pattern in c.source_patterns)
        loaded[name] = (
            _expand(target, converter, state),
            f"{pattern}[{number}]",
            _place(converter, pattern, number),
        )
    return loaded


def _place(converter: Any, pattern: str, number: int) -> tuple[int, int] | None:
    """Return the place of the `number`-th tensor of a pattern in a parameter that lists its parts one after another.

    So are experts that are stacked, each made of its patterns' tensors, and tensors that are joined by rows.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    if len(converter.target_patterns) > 1 or any(step[0] not in (Concatenate, MergeModulelist) for step in steps):
        return None
    which = list(converter.source_patterns).index(pattern)
    if steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        return number, which
    return (which, number) if steps == [(Concatenate, 0)] else None


def _expand(target: str, converter: Any, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return every parameter that a converter fills; `target` is the first."""
    first, *others = converter.target_patterns
    candidates = [target, *(target.replace(first, other) for other in others)]
    return tuple(name for name in candidates if name in state)


def _ties(module: nn.Module) -> dict[str, str]:
    """Return alias -> source for every tensor that the module holds under several names."""
    state: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    state.update(module.named_buffers(remove_duplicate=False))
    declared: Mapping[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    shared: dict[int, list[str]] = {}
    for name, tensor in state.items():
        shared.setdefault(id(tensor), []).append(name)
    ties: dict[str, str] = {}
    for names in shared.values():
        source = next((name for name in names if name not in declared), names[0])
        ties.update({name: source for name in names if name != source})
    return ties
