"""Snapshots of a module in training: a copy in memory while training waits, the rest in the background."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from twa_merge.adapters import full_model
from twa_merge.snapshot_stores import Store


class SnapshotTaker:
    """Takes snapshots one at a time, and keeps them while training goes on.

    Holds one copy of the module's tensors in host memory.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._pending: Future[None] | None = None
        self._held: dict[str, Tensor] = {}

    def take(self, step: int, module: nn.Module, processor: Any = None) -> None:
        """Copy the module as it is now, and keep the copy in the background.

        Args:
            step: names the snapshot.
            module: a transformers model is saved as its `save_pretrained` does, any other by its state dict; adapters
                of PEFT are merged into their base.
            processor: tokenizer or image processor that is saved with it.

        Raises:
            OSError: an earlier snapshot could not be written.
        """
        self.wait()  # the copy in memory is still being read
        with full_model(module) as (module, state):
            copied = self._copy(state)
        arrived = None
        if any(tensor.is_cuda for tensor in module.parameters()):
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._pending = self._pool.submit(self._keep, step, module, copied, processor, arrived)

    def wait(self) -> None:
        """Return when what was taken is kept."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _keep(
        self, step: int, module: nn.Module, state: dict[str, Tensor], processor: Any, arrived: torch.cuda.Event | None
    ) -> None:
        if arrived is not None:
            arrived.synchronize()
        self.store.add(step, module, state, processor)

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
