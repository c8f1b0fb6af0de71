"""Opening a split of a data set, wherever it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from twa_merge.data_hub import load_from_hub
from twa_merge.errors import UserError, first_line, raise_disk_failure
from twa_merge.splits import ALIASES, Rows, select_rows

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
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def open_split(source: Any, split: str | None = None, *, name: str | None = None, revision: str | None = None) -> Rows:
    """Return one split of a source.

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
        found = select_rows(label, {_own_split(source): lambda: source}, split)
    elif isinstance(source, datasets.DatasetDict):
        found = select_rows(label, _each(source), split)
    elif isinstance(source, (str, Path)):
        found = _open_named(str(source), split, name, revision)
    else:
        raise UserError(f"data: expected a path, a Hub name, a Dataset or a DatasetDict, got {type(source).__name__}")
    if len(found.dataset) == 0:
        raise UserError(f"data {label}: split {split or 'without a name'} is empty; expected at least one row")
    return replace(found, source=str(source) if isinstance(source, Path) else source)


def _each(splits: Any) -> dict[str, Callable[[], Any]]:
    return {str(key): partial(splits.__getitem__, key) for key in splits}


def _own_split(dataset: Any) -> str:
    return str(dataset.split) if dataset.split is not None else "train"


def _open_named(source: str, split: str | None, name: str | None, revision: str | None) -> Rows:
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
    return select_rows(source, _each(load_from_hub(source, name=name, revision=revision)), split)


def _data_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def _open_file(path: Path, split: str | None) -> Rows:
    reader = _READERS.get(_data_suffix(path))
    if reader is None:
        raise UserError(
            f"data {path}: cannot read {path.suffix or 'a file without suffix'}; expected {', '.join(_READERS)}"
        )
    stem = path.name.split(".")[0].lower()
    word = next(
        (w for w in re.split(r"[^a-z]+", stem) if w in ("train", "test", "validation") or w in ALIASES), "train"
    )
    own = ALIASES.get(word, word)
    return select_rows(path, {own: lambda: _load(path, reader, [str(path)])}, split)


def _load(path: Path, reader: str, files: list[str], **options: Any) -> Any:
    import datasets

    if reader == "csv" and any(_data_suffix(Path(file)) == ".tsv" for file in files):
        options["sep"] = "\t"
    if reader == "csv":  # texts such as "None" and "NA" are no missing values
        options |= {"keep_default_na": False, "na_values": [""]}
    if all(Path(file).stat().st_size == 0 for file in files):
        raise UserError(f"data {path}: the file is empty; expected at least one row")
    try:
        return datasets.load_dataset(reader, data_files={"train": files}, split="train", **options)
    except Exception as error:  # readers raise whatever pandas, pyarrow or decoders raise
        raise_disk_failure(error)
        if "corresponds to no data" in str(error):
            raise UserError(f"data {path}: has no rows; expected at least one") from error
        raise UserError(f"data {path}: not readable as {reader} ({first_line(error)}); check the file") from error


def _open_folder(path: Path, split: str | None) -> Rows:
    import datasets

    try:
        if (path / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(path))
            return select_rows(path, _each(splits), split)
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            dataset = datasets.load_from_disk(str(path))
            return select_rows(path, {_own_split(dataset): lambda: dataset}, split)
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
        return select_rows(path, _each(splits), split)
    # a split at a time: test files often lack the column of labels
    opened: dict[str, Callable[[], Any]] = {str(key): partial(_load, path, reader, list(files[key])) for key in files}
    return select_rows(path, opened, split)


def _load_all(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_dataset(str(path))
    except Exception as error:  # readers raise whatever pandas, pyarrow or decoders raise
        raise_disk_failure(error)
        raise UserError(f"data {path}: not readable ({first_line(error)}); check the folder") from error
