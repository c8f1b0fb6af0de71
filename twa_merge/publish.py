"""A folder appears complete or not at all, and never in the place of something that is not ours."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from twa_merge.checkpoints import Soup
from twa_merge.errors import UserError
from twa_merge.sources import SIDE_SUFFIXES

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_NOT_COPIED = {
    "trainer_state.json",
    "report.json",
    "mixing_weights.json",
    "adapter_config.json",
    "soup.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
}


def check_output(output: Path, soup: Soup | None, *, overwrite: bool) -> None:
    """Raise unless `output` may be written: new, or `overwrite` and neither an input nor something we did not write."""
    if output.is_symlink():
        raise UserError(f"{output}: is a symbolic link; name the folder that is to be written")
    parent = next(p for p in output.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"{output}: cannot be made, {parent} is no folder that can be written to; choose another output"
        )
    resolved = output.resolve()
    for label, places in _inputs(soup) if soup is not None else ():
        if any(_inside(place, resolved) for place in places):
            raise UserError(f"{output}: is or holds the input {label}; choose another output")
    if not output.exists():
        return
    if not overwrite:
        raise UserError(f"{output}: exists already; choose another output, or add --overwrite (overwrite=True)")
    if not output.is_dir() or (any(output.iterdir()) and not (output / "mixing_weights.json").is_file()):
        raise UserError(
            f"{output}: exists and is no earlier merge; --overwrite replaces only folders written by twa-merge"
        )


def check_working_folder(folder: Path, soup: Soup, *, name: str) -> None:
    """Raise if files that are written into `folder`, or into its `checkpoint-*`, could replace an input."""
    resolved = folder.resolve()
    for label, places in _inputs(soup):
        for place in places:
            inner = place.relative_to(resolved).parts[:1] if _inside(place, resolved) else None
            if inner is not None and (place == resolved or inner[0].startswith("checkpoint-")):
                raise UserError(f"{name} {folder}: holds the input {label}, which would be replaced; choose another")


def _inputs(soup: Soup) -> Iterator[tuple[str, set[Path]]]:
    """Yield each checkpoint's label, its folders and its files."""
    for source in soup.sources:
        places = {source.folder, *source.files, *(file.parent for file in source.files)}
        yield source.label, {place.resolve() for place in places if place is not None}


def _inside(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


@contextlib.contextmanager
def publish(output: Path, soup: Soup | None = None, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder beside `output` that becomes `output` by a rename if the block succeeds, and goes away if not."""
    check_output(output, soup, overwrite=overwrite)
    made = make_folder(output.parent)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}.unfinished-", dir=output.parent))
    try:
        unfinished.chmod(0o755)
        yield unfinished
        check_output(output, soup, overwrite=overwrite)
        if output.exists():
            replaced = unfinished.with_name(unfinished.name + ".replaced")
            output.rename(replaced)
            try:
                unfinished.rename(output)
            except BaseException:
                replaced.rename(output)
                raise
            shutil.rmtree(replaced)
        else:
            unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        remove_empty(made)


def replace_model(folder: Path, made: Path) -> None:
    """Move a complete model's files into a folder that may hold an earlier one: never an index with other shards."""
    new = {path.name for path in made.iterdir()}
    old = {path.name for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name)}
    for name in sorted(old, key=lambda name: not name.endswith("index.json")):
        if name.endswith("index.json") or name not in new:
            (folder / name).unlink()
    for name in sorted(new, key=lambda name: name.endswith("index.json")):
        os.replace(made / name, folder / name)


def make_folder(folder: Path) -> list[Path]:
    """Make a folder, and return those that were not there, the innermost first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, in order, as long as nothing is in them."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def copy_side_files(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Copy config, tokenizer and processor files; the weights, training state and reports stay behind."""
    for file in source.iterdir():
        kept = file.suffix in SIDE_SUFFIXES and file.name not in _NOT_COPIED and not file.name.endswith(".index.json")
        if kept and file.is_file():
            shutil.copyfile(file, target / file.name)
    config = target / "config.json"
    if dtype is not None and config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        for key in ("dtype", "torch_dtype"):
            if key in content:
                content[key] = str(dtype).removeprefix("torch.")
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
