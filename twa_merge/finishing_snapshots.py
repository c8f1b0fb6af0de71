"""The snapshots that `finish` merges: those of the trainer's callback or those named, the same for all processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from twa_merge.callbacks import FOLDER, SnapshotCallback
from twa_merge.checkpoints import Soup
from twa_merge.errors import UserError
from twa_merge.snapshot_stores import DiskStore, MemoryStore

if TYPE_CHECKING:
    from transformers import Trainer


def find_snapshots(trainer: Trainer, module: nn.Module, named: str | Path | Sequence[str | Path] | None) -> Soup:
    """Return the snapshots of a run.

    Args:
        trainer: whose `SnapshotCallback` has them, unless they are named.
        module: its model, without adapters.
        named: checkpoint folders or patterns.

    Raises:
        UserError: in all processes, if one of them finds none, or others.
    """
    return _agreed(trainer, lambda: _soup_of(trainer, module) if named is None else Soup(named))


def _soup_of(trainer: Trainer, module: nn.Module) -> Soup:
    callbacks = [one for one in trainer.callback_handler.callbacks if isinstance(one, SnapshotCallback)]
    for callback in callbacks:
        store = callback.store_of(trainer.args)
        if isinstance(store, MemoryStore) and trainer.accelerator.num_processes > 1:
            _spread(store, trainer, module)
        if store.steps:
            return callback.soup()
    where = ", ".join(str(one.store.folder) for one in callbacks if isinstance(one.store, DiskStore))
    hint = "train first" if callbacks else "add callbacks=[twa.SnapshotCallback()] to the trainer before it trains"
    raise UserError(
        f"finish: no snapshots{where and f' in {where}'}; {hint}, or name checkpoints ('runs/checkpoint-*')"
    )


def _agreed(trainer: Any, find: Callable[[], Soup]) -> Soup:
    """Return the snapshots that all processes find.

    Raises:
        UserError: in all of them, if one finds none, or others: each would wait for the others to score them.
    """
    if trainer.accelerator.num_processes == 1:
        return find()
    from accelerate.utils import gather_object

    soup: Soup | None = None
    failed: Exception | None = None
    try:
        soup = find()
    except Exception as error:  # the others wait
        failed = error
    mine = ((), f"{failed}" or type(failed).__name__) if soup is None else (tuple(soup.labels), "")
    everyone = gather_object([mine])
    if failed is not None and all(reason for _, reason in everyone):
        raise failed
    first, first_reason = everyone[0]
    for rank, (labels, reason) in enumerate(everyone):
        if labels != first:
            pair = next(pair for pair in zip_longest(first, labels, fillvalue="none") if pair[0] != pair[1])
            why = first_reason or reason
            raise UserError(
                f"finish: processes 0 and {rank} see different snapshots, {' and '.join(pair)}; keep them where all "
                f"processes can read{why and f' ({why})'}"
            )
    assert soup is not None
    return soup


def _spread(store: MemoryStore, trainer: Any, module: nn.Module) -> None:
    """Give every process the snapshots that the main one holds in memory, by a file in `output_dir`."""
    folder, main = Path(trainer.args.output_dir) / f"{FOLDER}_in_memory", trainer.is_world_process_zero()
    failed: Exception | None = None
    try:
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            store.save(folder)
    except Exception as error:  # the others wait
        failed = error
    trainer.accelerator.wait_for_everyone()
    try:
        if not main:
            store.load(folder)
            store.describe(module, trainer.processing_class)
    finally:
        trainer.accelerator.wait_for_everyone()
        if main:
            shutil.rmtree(folder, ignore_errors=True)
    if failed is not None:
        raise UserError(f"finish: {folder}: cannot be written ({failed})") from failed
