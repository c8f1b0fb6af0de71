"""Where snapshots are kept: checkpoint folders, or differences in few bits in memory.

On disk, a snapshot is a checkpoint folder like any other, and appears under its name when it is complete.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from twa_merge.errors import UserError
from twa_merge.held import HeldCheckpoints
from twa_merge.sources import SIDE_SUFFIXES, Source, find_sources, natural_key

_NAME = re.compile(r"snapshot-(\d+)")
_WEIGHTS = re.compile(r".*\.safetensors(\.index\.json)?")
_NOT_MODEL = {"trainer_state.json"}
_OF_CHECKPOINT = "snapshots.safetensors"


class Store(Protocol):
    """Where snapshots are kept."""

    @property
    def steps(self) -> list[int]:
        """Of the snapshots, in the order of the run."""

    def add(self, step: int, module: nn.Module, state: dict[str, Tensor], processor: Any) -> None:
        """Keep a module with this state."""

    def remove(self, step: int) -> None:
        """Drop a snapshot."""

    def sources(self) -> list[Source]:
        """Return the snapshots as a soup's members."""

    def save(self, checkpoint: Path) -> None:
        """Leave in a checkpoint of Trainer's what a run that resumes from it needs."""

    def load(self, checkpoint: Path) -> None:
        """Take up what `save` has left."""


class DiskStore:
    """Folders `snapshot-STEP` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def paths(self) -> dict[int, Path]:
        """Step -> folder, in the order of the run."""
        found = [path for path in self.folder.glob("snapshot-*") if _NAME.fullmatch(path.name)]
        return {int(path.name.partition("-")[2]): path for path in sorted(found, key=lambda p: natural_key(p.name))}

    @property
    def steps(self) -> list[int]:
        return list(self.paths)

    def add(self, step: int, module: nn.Module, state: dict[str, Tensor], processor: Any) -> None:
        def fill(folder: Path) -> None:
            if hasattr(module, "save_pretrained"):
                module.save_pretrained(folder, state_dict=dict(state))  # type: ignore[operator]
            else:
                _save_state(state, folder / "model.safetensors")
            if processor is not None:
                processor.save_pretrained(folder)

        self._publish(step, fill)

    def link(self, step: int, checkpoint: Path) -> None:
        """Keep a checkpoint that Trainer has saved, without a copy of its weights where the file system can."""

        def fill(folder: Path) -> None:
            for path in checkpoint.iterdir():
                if _WEIGHTS.fullmatch(path.name):
                    _link_or_copy(path, folder / path.name)
                elif path.suffix in SIDE_SUFFIXES and path.name not in _NOT_MODEL:
                    shutil.copyfile(path, folder / path.name)  # a later run may write into the same file

        self._publish(step, fill)

    def remove(self, step: int) -> None:
        path = self.folder / f"snapshot-{step}"
        hidden = path.with_name(f".{path.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)  # it is never seen half
        shutil.rmtree(hidden)

    def sources(self) -> list[Source]:
        return find_sources(list(self.paths.values()))

    def save(self, checkpoint: Path) -> None:
        """Do nothing: the folders stay."""

    def load(self, checkpoint: Path) -> None:
        """Do nothing: the folders are there."""

    def _publish(self, step: int, fill: Callable[[Path], None]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"snapshot-{step}"
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=self.folder) as beside:
            unfinished = Path(beside, target.name)
            unfinished.mkdir()
            fill(unfinished)
            if not target.exists():  # else another callback has taken the same step
                unfinished.rename(target)


class MemoryStore:
    """Differences from the first snapshot, in few bits; nothing on disk but the config.

    Args:
        storage: `int8` or `int4`.
    """

    def __init__(self, storage: str) -> None:
        self.held = HeldCheckpoints(storage)
        self._side = tempfile.TemporaryDirectory(prefix="twa_merge-")

    @property
    def steps(self) -> list[int]:
        return self.held.steps

    def add(self, step: int, module: nn.Module, state: dict[str, Tensor], processor: Any) -> None:
        if not self.held.steps:
            self.describe(module, processor)
        self.held.add(step, _first_of_ties(state))

    def describe(self, module: nn.Module, processor: Any) -> None:
        """Keep config and tokenizer or image processor of a model without adapters."""
        config: Any = copy.deepcopy(getattr(module, "config", None))
        if hasattr(config, "architectures"):
            config.architectures = [type(module).__name__]  # not of the model that this one was loaded from
        parts: tuple[Any, ...] = (config, getattr(module, "generation_config", None), processor)
        for part in parts:
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(self._side.name)

    def remove(self, step: int) -> None:
        self.held.remove(step)

    def sources(self) -> list[Source]:
        folder = Path(self._side.name)
        known = folder if (folder / "config.json").is_file() else None
        return [Source(f"snapshot-{step}", known, (), header=self.held.header(step), owner=self) for step in self.steps]

    def save(self, checkpoint: Path) -> None:
        self.held.save(checkpoint / _OF_CHECKPOINT)  # also if there are none yet: else none could be resumed from

    def load(self, checkpoint: Path) -> None:
        if not (checkpoint / _OF_CHECKPOINT).is_file():
            raise UserError(
                f"snapshots: {checkpoint} holds none: the run was started in another output_dir, or without snapshots "
                "in memory; put that checkpoint there, resume from an earlier one, or start anew"
            )
        self.held.load(checkpoint / _OF_CHECKPOINT)


def _first_of_ties(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without those that share another's memory; the first is the one that `named_parameters` gives."""
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), name)
    return {name: state[name].contiguous() for name in first.values()}


def _save_state(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(_first_of_ties(state), path, metadata={"format": "pt"})


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
