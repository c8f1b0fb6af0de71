"""Checkpoints as they lie on disk, memory-mapped, in place of deltas in memory.

Nothing of size N x D is held: both products stream the files, with the next pieces read ahead. That is storage `disk`,
and how tables are scored exactly while a basis in few bits learns.

Legend: N checkpoints, D_t elements of the parameter that are held here.
"""

from __future__ import annotations

import itertools
import mmap
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from twa_merge.kernels import Kernels
from twa_merge.tensorfile import Entry, Window

_TILE = 1 << 18
"""Elements that are summed at a time: their total stays in the cache."""
_AHEAD = 8 * _TILE
"""Elements of each checkpoint that are read ahead."""
_MAX_UPDATES = 32
"""Updates in place before the sum is made anew, so that roundings do not add up."""


class MappedFiles:
    """Memory maps of files, each made once.

    Args:
        owner: what must live as long, since the files are temporary otherwise.
    """

    def __init__(self, owner: object = None) -> None:
        self._owner = owner
        self._maps: dict[Path, tuple[BinaryIO, mmap.mmap, Tensor]] = {}

    def view(self, entry: Entry, position: int, count: int) -> Tensor:
        """Return elements `position ..` of a tensor, flat, not to be written to; not copied if they lie together."""
        pieces = list(entry.pieces(position, count))
        if len(pieces) != 1:
            return torch.cat([self.view(*piece) for piece in pieces])
        [(entry, position, count)] = pieces
        held = entry.values(position, count)
        if held is not None:
            return held
        size = entry.dtype.itemsize
        first = entry.start + position * size
        raw = self._map(entry.file)[2][first : first + count * size]
        return raw.view(entry.dtype) if first % size == 0 else raw.clone().view(entry.dtype)

    def read_ahead(self, entry: Entry, position: int, count: int) -> None:
        """Ask the system to read elements `position ..` in the background, where it can be asked."""
        pieces = entry.pieces(position, count) if hasattr(mmap, "MADV_WILLNEED") else ()
        for entry, position, count in pieces:
            if entry.values(0, 0) is not None:
                continue
            file, mapped, _ = self._map(entry.file)
            first = entry.start + position * entry.dtype.itemsize
            last = first + count * entry.dtype.itemsize
            page = first // mmap.PAGESIZE * mmap.PAGESIZE
            # asking for what is in memory looks every page up: half as long as using it
            if not (_in_memory(file, first) and _in_memory(file, last - 1)):
                mapped.madvise(mmap.MADV_WILLNEED, page, last - page)

    def _map(self, path: Path) -> tuple[BinaryIO, mmap.mmap, Tensor]:
        if path not in self._maps:
            file = path.open("rb", buffering=0)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                self._maps[path] = file, mapped, torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8))
        return self._maps[path]


class OriginalBlock:
    """One parameter of every checkpoint, in its file.

    Args:
        entries: the parameter in each of N checkpoints.
        window: the part of it that this process deals with.
        files: shared by all blocks.
        kernels: shared by all blocks.
    """

    nbytes = 0
    holds_sums = True

    def __init__(self, entries: Sequence[Entry], window: Window, files: MappedFiles, kernels: Kernels) -> None:
        self.entries, self.window, self.files, self.kernels = entries, window, files, kernels
        self.before: OriginalBlock | None = None
        self.after: OriginalBlock | None = None
        self._updates = 0

    def centre(self) -> Tensor:
        """Return the centre, flat, float32, summed anew."""
        out = torch.empty(self.window.numel)
        self._add(0.0, dict.fromkeys(range(len(self.entries)), 1 / len(self.entries)), out)
        return out

    def put(self, first: int, deltas: Tensor, centre: Tensor) -> None:
        """Do nothing: the files hold it."""

    def to(self, device: torch.device | str) -> None:
        """Do nothing: pieces are moved to where they are used."""

    @torch.no_grad()
    def combine(self, weights_N: Tensor, out: Tensor) -> None:
        """Write `sum_k w_k theta_k` into `out`, of the parameter's shape and any float dtype."""
        self._updates = 0
        self._add(0.0, _nonzero(weights_N), out)

    @torch.no_grad()
    def update(self, before_N: Tensor, weights_N: Tensor, out: Tensor) -> None:
        """Do what `combine` does, where `out` holds the sum with weights `before_N`: only what changed is read.

        A greedy soup that grows by one checkpoint reads one.
        """
        scale, changes = _change(before_N, weights_N)
        whole = _nonzero(weights_N)
        if out.dtype != torch.float32 or self._updates >= _MAX_UPDATES or len(changes) >= len(whole):
            return self.combine(weights_N, out)
        self._updates += 1
        if changes or scale != 1:
            self._add(scale, changes, out)
        return None

    @torch.no_grad()
    def project(self, grad: Tensor) -> Tensor:
        """Return the (N,) inner products of the gradient with the deltas.

        They are those with the differences from the first checkpoint, less their mean: products with the checkpoints
        themselves would lose small deltas in their rounding.
        """
        flat = grad.reshape(-1)
        total = torch.zeros(len(self.entries), dtype=torch.float64)
        for first, position, count in self._tiles(range(len(self.entries)), self.before):
            part = flat[first : first + count].float()
            start, *others = (self._piece(k, position, count, part) for k in range(len(self.entries)))
            total[1:] += self.kernels.project_pieces(others, start, part).double().cpu()
        return (total - total.mean()).to(grad.device, torch.float32)

    def _add(self, scale: float, weights: dict[int, float], out: Tensor) -> None:
        """Write `scale * out + sum_k w_k theta_k` into `out`."""
        direct = out.dtype == torch.float32 and out.is_contiguous()
        flat = out.view(-1) if out.is_contiguous() else torch.empty(out.numel(), dtype=out.dtype, device=out.device)
        for first, position, count in self._tiles(weights, self.after):
            where = flat[first : first + count]
            total = where if direct else torch.empty(count, dtype=torch.float32, device=out.device)
            total.zero_() if scale == 0 else total.mul_(scale)
            pieces = [self._piece(k, position, count, total) for k in weights]
            self.kernels.add_pieces(pieces, list(weights.values()), total)
            if not direct:
                where.copy_(total)
        if not out.is_contiguous():
            out.copy_(flat.view(out.shape))

    def _piece(self, k: int, position: int, count: int, like: Tensor) -> Tensor:
        return self.files.view(self.entries[k], position, count).to(like.device)

    def _tiles(
        self, members: Sequence[int] | dict[int, float], following: OriginalBlock | None
    ) -> Iterator[tuple[int, int, int]]:
        """Yield (first element of the window, position in the tensor, elements), with what comes next read ahead."""
        first = 0
        for start in range(0, self.window.numel, _AHEAD):
            block: OriginalBlock | None = self
            ahead = start + _AHEAD
            if ahead >= self.window.numel:
                block, ahead = following, 0
            if block is not None:
                block._read_ahead(members, ahead)
            for first in range(start, min(start + _AHEAD, self.window.numel), _TILE):
                size = min(_TILE, self.window.numel - first)
                done = first
                for position, count in self.window.pieces(first, size):
                    yield done, position, count
                    done += count

    def _read_ahead(self, members: Sequence[int] | dict[int, float], first: int) -> None:
        for position, count in self.window.pieces(first, min(_AHEAD, self.window.numel - first)):
            for k in members:
                self.files.read_ahead(self.entries[k], position, count)


def _in_memory(file: BinaryIO, position: int) -> bool:
    """Say whether a byte of a file can be had without waiting for a disk."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        return bool(os.preadv(file.fileno(), [bytearray(1)], position, os.RWF_NOWAIT))
    except OSError:  # it would have to wait, or the file system cannot tell
        return False


def in_order(blocks: Sequence[OriginalBlock]) -> None:
    """Tell blocks what a forward pass needs after them, and a backward pass before."""
    for before, after in itertools.pairwise(blocks):
        before.after, after.before = after, before


def _nonzero(weights_N: Tensor) -> dict[int, float]:
    return {k: w for k, w in enumerate(weights_N.tolist()) if w != 0}


def _change(before_N: Tensor, weights_N: Tensor) -> tuple[float, dict[int, float]]:
    """Return (scale, change) with `weights = scale * before + change`, and few checkpoints in the change.

    A scale beyond one would multiply what earlier sums were rounded by.
    """
    held = before_N != 0
    ratios = (weights_N[held] / before_N[held]).tolist()
    choices = []
    common = max(ratios, key=ratios.count)
    for scale in {1.0, common if abs(common) <= 1 else 1.0}:
        change = weights_N - scale * before_N
        change[change.abs() <= 1e-12] = 0  # rounding of the ratio
        choices.append((scale, _nonzero(change)))
    return min(choices, key=lambda choice: len(choice[1]))
