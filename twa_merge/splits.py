"""Which rows a split means, which splits share rows, and which held-out rows fit and which select."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from twa_merge.errors import UserError, first_line

ALIASES = dict.fromkeys(("dev", "val", "valid", "eval", "development"), "validation") | {"training": "train"}


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a source."""

    source: Any
    """Path, Hub name or object that they are from."""
    dataset: Any
    ranges: tuple[tuple[str, int, int], ...]
    """Split, first row, and the row after the last; for each piece of the dataset in turn."""
    are_features: bool = False
    """The caller has made features of them."""


def select_rows(label: Any, splits: Mapping[str, Callable[[], Any]], split: str | None) -> Rows:
    """Return the rows that `split` describes; only the splits it names are opened.

    Args:
        label: names the source.
        splits: name -> opens it.
        split: `train`, `validation[:10%]`, `train+validation`, ...; None: `validation`, or the only one there is.

    Raises:
        UserError: there is no such split, or it has to be named.
    """
    import datasets

    if split is None:
        name = _only_split(label, splits)
        dataset = splits[name]()
        return Rows(label, dataset, ((name, 0, len(dataset)),))
    names = [_split_name(label, part, splits) for part in split.split("+")]
    opened = {name: splits[name]() for name in dict.fromkeys(names)}
    spec = "+".join(name + _slice(part) for name, part in zip(names, split.split("+"), strict=True))
    try:
        pieces = datasets.ReadInstruction.from_spec(spec).to_absolute({key: len(data) for key, data in opened.items()})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"data {label}: cannot read the split {split!r} ({first_line(error)}); expected e.g. train[:10%]"
        ) from error
    ranges = tuple((p.splitname, p.from_ or 0, len(opened[p.splitname]) if p.to is None else p.to) for p in pieces)
    parts = [opened[name].select(range(first, beyond)) for name, first, beyond in ranges]
    return Rows(label, parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts), ranges)


def require_disjoint(rows: Mapping[str, Rows]) -> None:
    """Raise if two of the sets of rows share any: what is learned on must not select, and what selects must not test.

    Args:
        rows: role, such as `test`, -> its rows. Rows of different sources are not compared.
    """
    for (role, a), (other, b) in combinations(rows.items(), 2):
        if not _same_source(a, b):
            continue
        for (split, first, beyond), (name, start, end) in ((x, y) for x in a.ranges for y in b.ranges):
            shared = range(max(first, start), min(beyond, end))
            if split == name and len(shared):
                named = isinstance(a.source, str)
                mend = f"name splits that share no row, such as {split}[:80%] and {split}[80%:]"
                raise UserError(
                    f"data: rows {shared.start} to {shared.stop - 1} of {split!r} are {role} and {other} data; "
                    f"{mend if named else 'give sets that share no row'}"
                )


def same_split(a: Rows, b: Rows) -> bool:
    """Whether any rows of both are from one split of one source."""
    return _same_source(a, b) and bool({r[0] for r in a.ranges} & {r[0] for r in b.ranges})


def _same_source(a: Rows, b: Rows) -> bool:
    return a.source is b.source or (isinstance(a.source, str) and isinstance(b.source, str) and a.source == b.source)


def split_indices(
    num_samples: int, *, select_fraction: float = 0.2, min_select: int = 200, folds: int = 5, seed: int = 0
) -> list[tuple[list[int], list[int]]]:
    """Divide samples at random into those that fit coefficients and those that select among merges.

    Args:
        num_samples: S.
        select_fraction: share that selects, when there are plenty.
        min_select: and at least so many.
        folds: with fewer than `3 * min_select` samples, each of so many folds selects once (cross-fitting).
        seed: equal seeds give equal divisions.

    Returns:
        Pairs (fit, select) of ascending indices: one pair, or `folds` whose select parts cover every sample once.
    """
    if not 0 < select_fraction < 1:
        raise UserError(f"select_fraction: expected a share between 0 and 1, got {select_fraction}")
    if folds < 2 or min_select < 1:
        raise UserError(f"folds and min_select: expected at least 2 and 1, got {folds} and {min_select}")
    order = np.random.default_rng(seed).permutation(num_samples)
    if num_samples >= 3 * min_select:
        parts = [order[: max(round(select_fraction * num_samples), min_select)]]
    elif num_samples >= 2 * folds:
        parts = np.array_split(order, folds)
    else:
        raise UserError(
            f"data: {num_samples} held-out samples are too few to learn from and select on; expected at least "
            f"{2 * folds} ({folds} folds of 2): give more data, or average without data"
        )
    pairs = []
    for part in parts:
        chosen = np.zeros(num_samples, dtype=bool)
        chosen[part] = True
        pairs.append((np.flatnonzero(~chosen).tolist(), np.flatnonzero(chosen).tolist()))
    return pairs


def _only_split(source: Any, splits: Iterable[str]) -> str:
    names = list(splits)
    if len(names) == 1:
        return names[0]
    if "validation" in names:
        return "validation"
    raise UserError(f"data {source}: has the splits {', '.join(names)}; name one")


def _slice(part: str) -> str:
    return part[part.index("[") :].strip() if "[" in part else ""


def _split_name(source: Any, part: str, splits: Iterable[str]) -> str:
    wanted = part.split("[")[0].strip()
    for name in (wanted, ALIASES.get(wanted.lower(), wanted)):
        if name in splits:
            return name
    raise UserError(f"data {source}: no split {wanted!r}; expected one of {', '.join(splits)}")
