"""Opening a split of a data set, wherever it is; and dividing it into what is fitted and what selects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from twa_merge.data_hub import first_line, load_from_hub
from twa_merge.errors import UserError, raise_disk_failure

_READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".arrow": "arrow",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_ALIASES = dict.fromkeys(("dev", "val", "valid", "eval", "development"), "validation") | {"training": "train"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def open_split(source: Any, split: str | None = None, *, name: str | None = None, revision: str | None = None) -> Any:
    """Return one split as a `datasets.Dataset`.

    Args:
        source: a csv, tsv, json, jsonl, parquet, txt or arrow file; a folder of such files named by split, of class
            folders of images, or made by `save_to_disk`; a Hub name `org/name`; a `Dataset` or `DatasetDict`. An
            existing path is never taken for a Hub name.
        split: `train`, `validation[:10%]`, `train+validation`, ...; None if there is only one.
        name: which configuration of a data set on the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: not there, not readable, no such split, or empty.
    """
    import datasets

    label = source if isinstance(source, (str, Path)) else type(source).__name__
    if isinstance(source, datasets.Dataset):
        found = _select(label, {_own_split(source): lambda: source}, split)
    elif isinstance(source, datasets.DatasetDict):
        found = _select(label, _each(source), split)
    elif isinstance(source, (str, Path)):
        found = _open_named(str(source), split, name, revision)
    else:
        raise UserError(f"data: expected a path, a Hub name, a Dataset or a DatasetDict, got {type(source).__name__}")
    if len(found) == 0:
        raise UserError(f"data {label}: split {split or 'without a name'} is empty; expected at least one row")
    return found


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


def _each(splits: Any) -> dict[str, Callable[[], Any]]:
    return {str(key): partial(splits.__getitem__, key) for key in splits}


def _own_split(dataset: Any) -> str:
    return str(dataset.split) if dataset.split is not None else "train"


def _open_named(source: str, split: str | None, name: str | None, revision: str | None) -> Any:
    path = Path(source).expanduser()
    if path.is_file():
        return _open_file(path, split)
    if path.is_dir():
        return _open_folder(path, split)
    if source.startswith((".", "/", "~")) or _data_suffix(path) in _READERS:
        raise UserError(f"data {source}: no such file or folder")
    # `runs/data` beside an existing folder `runs` is a mistyped path: ask nobody about it
    if not _HUB_NAME.fullmatch(source) or path.parent.is_dir():
        raise UserError(f"data {source}: no such file or folder, and not a Hub name, which is `org/name`")
    found = load_from_hub(source, split, name=name, revision=revision)
    return found if split is not None else _select(source, _each(found), None)


def _data_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def _open_file(path: Path, split: str | None) -> Any:
    reader = _READERS.get(_data_suffix(path))
    if reader is None:
        raise UserError(
            f"data {path}: cannot read {path.suffix or 'a file without suffix'}; expected {', '.join(_READERS)}"
        )
    stem = path.name.split(".")[0].lower()
    word = next(
        (w for w in re.split(r"[^a-z]+", stem) if w in ("train", "test", "validation") or w in _ALIASES), "train"
    )
    own = _ALIASES.get(word, word)
    return _select(path, {own: lambda: _load(path, reader, [str(path)])}, split)


def _load(path: Path, reader: str, files: list[str], **options: Any) -> Any:
    import datasets

    if reader == "csv" and any(_data_suffix(Path(file)) == ".tsv" for file in files):
        options["sep"] = "\t"
    if all(Path(file).stat().st_size == 0 for file in files):
        raise UserError(f"data {path}: the file is empty; expected at least one row")
    try:
        return datasets.load_dataset(reader, data_files={"train": files}, split="train", **options)
    except Exception as error:  # readers raise whatever pandas, pyarrow or decoders raise
        raise_disk_failure(error)
        if "corresponds to no data" in str(error):
            raise UserError(f"data {path}: has no rows; expected at least one") from error
        raise UserError(f"data {path}: not readable as {reader} ({first_line(error)}); check the file") from error


def _open_folder(path: Path, split: str | None) -> Any:
    import datasets

    try:
        if (path / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(path))
            return _select(path, _each(splits), split)
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            dataset = datasets.load_from_disk(str(path))
            return _select(path, {_own_split(dataset): lambda: dataset}, split)
        builder = datasets.load_dataset_builder(str(path))
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise_disk_failure(error)
        raise UserError(
            f"data {path}: no data found in this folder ({first_line(error)}); expected files named by split "
            "(train.csv, ...), folders of images by class, or what save_to_disk wrote"
        ) from error
    files = builder.config.data_files or {}
    reader = type(builder).__module__.rsplit(".", 1)[-1]
    if reader not in _READERS.values():  # folders of images: all splits at once, so that their classes are the same
        splits = _load_all(path)
        return _select(path, _each(splits), split)
    # a split at a time: test files often lack the column of labels
    opened: dict[str, Callable[[], Any]] = {str(key): partial(_load, path, reader, list(files[key])) for key in files}
    return _select(path, opened, split)


def _load_all(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_dataset(str(path))
    except Exception as error:  # readers raise whatever pandas, pyarrow or decoders raise
        raise_disk_failure(error)
        raise UserError(f"data {path}: not readable ({first_line(error)}); check the folder") from error


def _select(label: Any, splits: dict[str, Callable[[], Any]], split: str | None) -> Any:
    """Return the rows that `split` describes; only the splits it names are opened."""
    import datasets

    if split is None:
        if len(splits) == 1:
            return next(iter(splits.values()))()
        if "validation" in splits:
            return splits["validation"]()
        raise UserError(f"data {label}: has the splits {', '.join(splits)}; name one")
    names = [_split_name(label, part, splits) for part in split.split("+")]
    opened = {name: splits[name]() for name in dict.fromkeys(names)}
    spec = "+".join(name + _slice(part) for name, part in zip(names, split.split("+"), strict=True))
    try:
        pieces = datasets.ReadInstruction.from_spec(spec).to_absolute({key: len(data) for key, data in opened.items()})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"data {label}: cannot read the split {split!r} ({first_line(error)}); expected e.g. train[:10%]"
        ) from error
    parts = [
        opened[p.splitname].select(range(p.from_ or 0, len(opened[p.splitname]) if p.to is None else p.to))
        for p in pieces
    ]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _slice(part: str) -> str:
    return part[part.index("[") :].strip() if "[" in part else ""


def _split_name(label: Any, part: str, splits: Iterable[str]) -> str:
    wanted = part.split("[")[0].strip()
    for name in (wanted, _ALIASES.get(wanted.lower(), wanted)):
        if name in splits:
            return name
    raise UserError(f"data {label}: no split {wanted!r}; expected one of {', '.join(splits)}")
