"""What a checkpoint argument means: folder, glob, file, Trainer's `checkpoint-*`, or `org/name@revision` on the Hub."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from twa_merge.errors import UserError, first_line, raise_disk_failure
from twa_merge.tensorfile import Entry

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".spm", ".codes", ".tokenizer")
"""Of the files beside the weights: config, tokenizer (in all the forms that transformers knows), processor."""
_HUB_ALLOW = ["*.safetensors", "*.safetensors.index.json", *(f"*{suffix}" for suffix in SIDE_SUFFIXES)]
_HUB_IGNORE = ["*/*", "consolidated*"]
_NOT_WEIGHTS = {"mixing_weights.safetensors", "training_state.safetensors"}


@dataclass(frozen=True)
class Source:
    """Where one checkpoint's files are."""

    label: str
    """As the user named it; globs expanded."""
    folder: Path | None
    """Holds config and tokenizer; None for a single file without a config beside it."""
    files: tuple[Path, ...]
    """Its safetensors files (or pickles, where the user asked for them)."""
    revision: str | None = None
    """Commit hash, for a checkpoint from the Hub."""
    header: Mapping[str, Entry] | None = None
    """The tensors themselves, of a checkpoint that is held in memory."""
    owner: object = None
    """What must live as long as this."""


def find_sources(
    checkpoints: str | Path | Sequence[str | Path | Source], *, allow_pickle: bool = False
) -> list[Source]:
    """Resolve checkpoint arguments in order; globs expand in natural order (`checkpoint-200` before `-1000`).

    An existing path is never taken for a Hub id.

    Raises:
        UserError: something is not there, or holds no weights.
    """
    found: list[Source] = []
    for argument in [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints:
        if isinstance(argument, Source):
            found.append(argument)
        else:
            found += _expand(str(argument).rstrip("/") or "/", allow_pickle=allow_pickle)
    return found


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key in which numbers compare as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def require_order(labels: Sequence[str]) -> None:
    """Raise if snapshots of one run, whose names differ in a number, are not in the order of these numbers.

    An unquoted `checkpoint-*` comes from the shell as 1000, 200, 500.
    """
    if len({re.sub(r"\d+", "#", label) for label in labels}) == 1 and list(labels) != sorted(labels, key=natural_key):
        raise UserError(
            f"snapshots: expected in the order of the run, got {', '.join(labels[:3])}, ...; put the pattern in quotes "
            "('runs/checkpoint-*') or name them in order"
        )


def _expand(argument: str, *, allow_pickle: bool) -> list[Source]:
    path = Path(argument).expanduser()
    if path.exists():
        return [_local(argument, path, allow_pickle=allow_pickle)]
    if glob.has_magic(argument):
        matches = sorted(glob.glob(str(path)), key=natural_key)
        if not matches:
            raise UserError(f"{argument}: no file or folder matches this pattern")
        return [_local(match, Path(match), allow_pickle=allow_pickle) for match in matches]
    match = _HUB_ID.fullmatch(argument)
    # `runs/a` beside an existing folder `runs` is a mistyped path: ask nobody about it.
    if match is None or Path(match["repo"]).parent.exists():
        raise UserError(f"{argument}: no such checkpoint; expected a folder, a safetensors file or a Hub id `org/name`")
    return [_hub(argument, match["repo"], match["revision"])]


def _local(label: str, path: Path, *, allow_pickle: bool) -> Source:
    if path.is_dir():
        return Source(label, path, _weight_files(path, allow_pickle=allow_pickle))
    if path.suffix != ".safetensors" and not allow_pickle:
        raise UserError(f"{path}: expected a folder or a .safetensors file; for a pickle you trust, add --allow-pickle")
    folder = path.parent if (path.parent / "config.json").is_file() else None
    return Source(label, folder, (path,))


def _weight_files(folder: Path, *, allow_pickle: bool) -> tuple[Path, ...]:
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder}: a LoRA adapter, not a full checkpoint; adapters are not supported yet: merge it into its base "
            "first (PeftModel.merge_and_unload, then save_pretrained)"
        )
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if suffix == "bin" and not allow_pickle:
            continue
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.is_file() and index.is_file():
            raise UserError(
                f"{folder}: holds both {single.name} and {index.name}; remove the one that is not the model"
            )
        if single.is_file():
            return (single,)
        if index.is_file():
            return _shards(index)
    others = sorted(p for p in folder.glob("*.safetensors") if p.name not in _NOT_WEIGHTS)
    if len(others) == 1:
        return (others[0],)
    raise UserError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    inner = sorted((p.name for p in folder.glob("checkpoint-*") if p.is_dir()), key=natural_key)
    if inner:
        return f"{folder}: no model.safetensors here, but {len(inner)} snapshots; did you mean {folder}/checkpoint-*?"
    if (folder / "pytorch_model.bin").is_file() or (folder / "pytorch_model.bin.index.json").is_file():
        return f"{folder}: holds only pickled weights (pytorch_model.bin); if you trust them, add --allow-pickle"
    return f"{folder}: no model.safetensors or model.safetensors.index.json; is this a checkpoint folder?"


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index}: not a readable index ({error!r}); download or save the checkpoint again") from error
    if not names:
        raise UserError(f"{index}: lists no file")
    files = []
    for name in sorted(names):
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{index}: points outside its folder ({name!r}); refused")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name}: shard is missing, but listed in {index.name}")
        files.append(index.parent / name)
    return tuple(files)


def _hub(label: str, repo: str, revision: str | None) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(
            snapshot_download(repo, revision=revision, allow_patterns=_HUB_ALLOW, ignore_patterns=_HUB_IGNORE)
        )
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise_disk_failure(error)
        raise UserError(_hub_failure(label, error)) from error
    except Exception as error:  # the transport's own errors share no public base class with OSError
        if "connect" not in type(error).__name__.lower() and "timeout" not in type(error).__name__.lower():
            raise
        raise UserError(_hub_failure(label, error)) from error
    return Source(label, folder, _weight_files(folder, allow_pickle=False), revision=folder.name)


def _hub_failure(label: str, error: Exception) -> str:
    return f"{label}: no such folder here, and the Hub gave no such model ({first_line(error)})"
