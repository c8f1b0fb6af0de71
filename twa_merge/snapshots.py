"""Snapshots of a module in training: a copy in memory while training waits, files in the background.

A snapshot is a checkpoint folder like any other. It appears under its name when it is complete.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twa_merge.adapters import is_adapted, merged_adapters
from twa_merge.sources import SIDE_SUFFIXES, natural_key

_NAME = re.compile(r"snapshot-(\d+)")
_WEIGHTS = re.compile(r".*\.safetensors(\.index\.json)?")
_NOT_MODEL = {"trainer_state.json"}


def find_snapshots(folder: Path) -> dict[int, Path]:
    """Return step -> folder of the snapshots in `folder`, in the order of the run."""
    found = (path for path in folder.glob("snapshot-*") if _NAME.fullmatch(path.name))
    return {int(path.name.partition("-")[2]): path for path in sorted(found, key=lambda path: natural_key(path.name))}


def remove_snapshot(path: Path) -> None:
    """Remove a snapshot so that it is never seen half."""
    hidden = path.with_name(f".{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


class SnapshotWriter:
    """Writes snapshots into a folder, one at a time, while training goes on.

    Holds one copy of the module's tensors in host memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._pending: Future[None] | None = None
        self._held: dict[str, Tensor] = {}

    def take(self, step: int, module: nn.Module, processor: Any = None) -> None:
        """Copy the module as it is now, and write the copy in the background.

        Args:
            step: names the snapshot.
            module: a transformers model is saved as its `save_pretrained` does, any other by its state dict; adapters
                of PEFT are merged into their base.
            processor: tokenizer or image processor that is saved with it.

        Raises:
            OSError: an earlier snapshot could not be written.
        """
        self.wait()  # the copy in memory is still being read
        if is_adapted(module):
            with merged_adapters(module) as (module, state):
                copied = self._copy(state)
        else:
            copied = self._copy(module.state_dict(keep_vars=True))
        arrived = None
        if any(tensor.is_cuda for tensor in module.parameters()):
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._pending = self._pool.submit(self._write, step, module, copied, processor, arrived)

    def link(self, step: int, checkpoint: Path) -> None:
        """Make a snapshot of a checkpoint that Trainer has saved, without a copy where the file system can."""
        self.wait()

        def fill(folder: Path) -> None:
            for path in checkpoint.iterdir():
                if _WEIGHTS.fullmatch(path.name) or (path.suffix in SIDE_SUFFIXES and path.name not in _NOT_MODEL):
                    _link_or_copy(path, folder / path.name)

        self._publish(step, fill)

    def wait(self) -> None:
        """Return when what was taken is written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _copy(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """Return a copy in host memory; tensors that share memory share it there too."""
        copies: dict[tuple[Any, ...], Tensor] = {}
        copied = {}
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                continue
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
            if key not in copies:
                copies[key] = self._copy_one(name, tensor.detach())
            copied[name] = copies[key]
        self._held = copied
        return copied

    def _copy_one(self, name: str, tensor: Tensor) -> Tensor:
        held = self._held.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        # from a GPU in the background, in the order of its stream: before the next step's update
        return held.copy_(tensor, non_blocking=True)

    def _write(
        self, step: int, module: nn.Module, state: dict[str, Tensor], processor: Any, arrived: torch.cuda.Event | None
    ) -> None:
        if arrived is not None:
            arrived.synchronize()

        def fill(folder: Path) -> None:
            if hasattr(module, "save_pretrained"):
                module.save_pretrained(folder, state_dict=dict(state))  # type: ignore[operator]
            else:
                _save_state(state, folder / "model.safetensors")
            if processor is not None:
                processor.save_pretrained(folder)

        self._publish(step, fill)

    def _publish(self, step: int, fill: Callable[[Path], None]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"snapshot-{step}"
        unfinished = target.with_name(f".{target.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        fill(unfinished)
        if target.exists():
            remove_snapshot(target)
        unfinished.rename(target)


def _save_state(state: dict[str, Tensor], path: Path) -> None:
    """Save tensors; of those that share memory the first, which is the one that `named_parameters` gives."""
    from safetensors.torch import save_file

    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), name)
    kept = {name: state[name].contiguous() for name in first.values()}
    save_file(kept, path, metadata={"format": "pt"})


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
