"""A run as data: strict YAML <-> dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from twa_merge.errors import UserError
from twa_merge.learn_config import LearnConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is held out, what is tested on, and how rows become features."""

    path: str | None = None
    """A file, a folder, a saved data set, or a Hub name."""
    name: str | None = None
    """Configuration of a Hub data set."""
    split: str | None = None
    """Held-out split (TWA-v); default `validation`, or the only split there is."""
    train_split: str | None = None
    """Learn on this training split (TWA-t); the held-out split then only selects."""
    test_split: str | None = None
    """Scored once, at the end, for the league table only."""
    columns: dict[str, str] = field(default_factory=dict)
    """Role -> column, such as `text: sentence`."""
    max_length: int | None = None
    problem_type: str | None = None
    """Of a text classification; default as in the checkpoint's config, or found from its labels."""
    source_prefix: str = ""
    """Put before every source text of a seq2seq task, as T5 was trained: `translate English to German: `."""
    preprocess: str | None = None
    """`package.module:function` that makes features of a task without a built-in."""
    metrics: list[str] | None = None
    select_fraction: float = 0.2
    """Share of the held-out samples that is not learned on but decides."""
    min_select: int = 200
    """At least so many of them; with less than three times that, folds take turns (cross-fitting)."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is written."""

    path: str | None = None
    dtype: str | None = None
    """`float32`, `bfloat16` or `float16`; default as in the checkpoints."""
    max_shard_gb: float = 5.0
    push_to_hub: str | None = None
    """`org/name` to upload the merge to, once it is written."""
    private: bool = False
    """Make that repository a private one."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a learned merge needs; see the fields of its parts."""

    checkpoints: list[str] = field(default_factory=list)
    task: str | None = None
    """Default: found from the first checkpoint's `architectures`."""
    data: DataConfig = field(default_factory=DataConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    ordered: bool = False
    """The checkpoints are snapshots of one run, in order: last-k (LAWA; k = 1, 2, 3, 4, 6, 8, 12, ...) and EMA join
    the baselines."""
    margin: float = 1.0
    """Paired standard errors by which a learned merge must beat the best baseline to ship."""
    eval_batch_size: int = 64
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    dtype: str = "float32"
    """Of the module while learning."""
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if self.eval_batch_size < 1:
            raise UserError(f"eval_batch_size: expected at least 1, got {self.eval_batch_size}")
        if not math.isfinite(self.margin):
            raise UserError(f"margin: expected a number of standard errors, got {self.margin}")
        if self.data.max_length is not None and self.data.max_length < 1:
            raise UserError(f"data.max_length: expected at least 1, got {self.data.max_length}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `key.sub=value` overrides (values are YAML).

    Raises:
        UserError: unreadable file, unknown key (the nearest known one is named), or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such recipe")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, got {type(content).__name__}")
    for override in overrides:
        apply_override(content, override)
    return from_dict(content, where=str(path))


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in a nested mapping."""
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"{override!r}: expected key=value, such as learn.lr=0.01")
    *parents, last = key.split(".")
    for parent in parents:
        inner = content.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(f"{override!r}: {parent!r} is no section")
        content = inner
    try:
        content[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{override!r}: the value is not readable as YAML ({reason}); quote names with a *") from error


def from_dict(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Return the recipe of nested mappings, strictly checked."""
    return typing.cast(Recipe, _build(Recipe, content, where, ""))


def with_options(learn: LearnConfig, options: Mapping[str, Any], where: str) -> LearnConfig:
    """Return a `learn` section with some values replaced, as strictly checked as those of a file; tuples are lists."""
    given = dataclasses.asdict(learn) | dict(options)
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    return typing.cast(LearnConfig, _build(LearnConfig, plain, where, ""))


def to_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML, every value written out."""
    text: str = yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)
    return text


def _build(cls: type, content: Any, where: str, prefix: str) -> Any:
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: {prefix.rstrip('.') or 'recipe'}: expected keys and values, got {content!r}")
    known = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"{where}: unknown key {prefix}{key!s}; {hint}")
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            values[key] = _build(typing.cast(type, kind), value, where, f"{prefix}{key}.")
        else:
            values[key] = _value(kind, value, f"{where}: {prefix}{key}")
    return cls(**values)


def _value(kind: Any, value: Any, where: str) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        if _fits(option, value):
            return float(value) if option is float else value
        if option is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            try:
                return float(value)
            except ValueError:
                continue
    names = " or ".join("null" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise UserError(f"{where}: expected {names}, got {value!r}")


def _fits(kind: Any, value: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is list:
        return isinstance(value, list) and all(isinstance(v, str) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
