"""How the deltas of one parameter are held: whole in float32, or in tiles of few bits.

Legend: N checkpoints, D_t elements of the parameter that are held here, T tiles of B elements.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Protocol

import torch
from torch import Tensor

from twa_merge.kernels import Kernels
from twa_merge.quantize import BLOCK, quantize

TILE = 4096
"""Elements of a tile of codes; tiles of bfloat16 have half as many. Measured: docs/performance.md."""
_APART, _LINE = 1024, 16
"""Elements of 4 KiB and of a cache line."""
_HUGE_PAGE = 1 << 21


class Block(Protocol):
    """Centre and deltas of one parameter."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""

    def put(self, first: int, deltas: Tensor, centre: Tensor) -> None:
        """Store elements `first ..`: deltas (N, count) float32 and centre (count,); `first` is a multiple of TILE."""

    def combine(self, weights_N: Tensor, out: Tensor) -> None:
        """Write `m + sum_k w_k d_k` into `out`, of the parameter's shape and any float dtype."""

    def project(self, grad: Tensor) -> Tensor:
        """Return the (N,) inner products of the parameter's gradient with the deltas."""

    def centre(self) -> Tensor:
        """Return the centre, flat, float32; not to be written to."""

    def to(self, device: torch.device | str) -> None:
        """Move to a device."""

    holds_sums: bool
    """Whether `combine` gives `sum_k w_k theta_k` for weights of any sum."""


class FloatBlock:
    """N float32 rows: all deltas but the last, which is minus the sum of the others, and the centre.

    Both products read them once. What the last delta carries of the others' rounding is 1e-7 of them.
    """

    holds_sums = False

    def __init__(self, num_checkpoints: int, numel: int, kernels: Kernels) -> None:
        self.kernels = kernels
        # rows that start a multiple of 4 KiB apart would push each other out of a cache that places by address
        stride = numel if numel < _APART else -(-numel // _APART) * _APART + _LINE
        self.rows = large_empty((num_checkpoints, stride), torch.float32)[:, :numel]

    @property
    def nbytes(self) -> int:
        return len(self.rows) * self.rows.stride(0) * self.rows.itemsize

    def put(self, first: int, deltas: Tensor, centre: Tensor) -> None:
        self.rows[:-1, first : first + len(centre)] = deltas[:-1]
        self.rows[-1, first : first + len(centre)] = centre

    def combine(self, weights_N: Tensor, out: Tensor) -> None:
        rows = self.rows
        row = torch.ones(len(rows), dtype=rows.dtype, device=rows.device)
        row[:-1] = weights_N[:-1] - weights_N[-1]
        if out.is_contiguous() and self.kernels.combine_rows(rows[:-1], row[:-1], rows[-1], out.view(-1)):
            return
        if out.dtype == rows.dtype and out.is_contiguous() and rows.device.type == "cpu":
            torch.matmul(row.unsqueeze(0), rows, out=out.view(1, -1))
        else:  # a matrix times a vector: on GPUs, never in TF32
            out.copy_(torch.matmul(row, rows).view(out.shape))

    def project(self, grad: Tensor) -> Tensor:
        products = torch.mv(self.rows[:-1], grad.reshape(-1).to(self.rows.dtype))
        return torch.cat([products, -products.sum(dim=0, keepdim=True)])

    def centre(self) -> Tensor:
        return self.rows[-1]

    def to(self, device: torch.device | str) -> None:
        self.rows = self.rows.to(device)


class TiledBlock:
    """Deltas in bfloat16 or as block-wise codes, the centre in float32.

    Rounded deltas no longer sum to zero. Weights are therefore taken relative to their mean, and products too: equal
    weights give the centre exactly, whatever the rounding.
    """

    holds_sums = False

    def __init__(self, num_checkpoints: int, numel: int, bits: int, kernels: Kernels) -> None:
        self.bits, self.kernels, self.numel = bits, kernels, numel
        longest = TILE // 2 if bits == 16 else TILE
        self.tile = max(2 * BLOCK, min(longest, -(-numel // (2 * BLOCK)) * 2 * BLOCK))
        tiles = -(-numel // self.tile)
        dtype = {16: torch.bfloat16, 8: torch.int8, 4: torch.uint8}[bits]
        width = self.tile // 2 if bits == 4 else self.tile
        self.codes = large_empty((tiles, num_checkpoints, width), dtype)
        self.scales = None if bits == 16 else large_empty((tiles, num_checkpoints, self.tile // BLOCK), torch.float32)
        self.centre_TB = large_empty((tiles, self.tile), torch.float32)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.centre_TB.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def put(self, first: int, deltas: Tensor, centre: Tensor) -> None:
        count = len(centre)
        self.centre_TB.view(-1)[first : first + count] = centre
        padded = torch.nn.functional.pad(deltas, (0, -count % self.tile))
        tiles_TNB = padded.view(len(padded), -1, self.tile).transpose(0, 1).contiguous()
        where = slice(first // self.tile, first // self.tile + len(tiles_TNB))
        if self.scales is None:
            self.codes[where] = tiles_TNB
        else:
            self.codes[where], self.scales[where] = quantize(tiles_TNB, self.bits)

    def combine(self, weights_N: Tensor, out: Tensor) -> None:
        weights_N = weights_N.to(self.centre_TB)
        weights_N = weights_N - weights_N.mean()
        flat = out.view(-1) if out.is_contiguous() else torch.empty(self.numel, dtype=out.dtype, device=out.device)
        whole = self.numel // self.tile
        end = whole * self.tile
        self._combine_tiles(slice(0, whole), weights_N, flat[:end].view(whole, self.tile))
        if end < self.numel:
            last = torch.empty(1, self.tile, dtype=out.dtype, device=out.device)
            self._combine_tiles(slice(whole, whole + 1), weights_N, last)
            flat[end:] = last[0, : self.numel - end]
        if not out.is_contiguous():
            out.copy_(flat.view(out.shape))

    def project(self, grad: Tensor) -> Tensor:
        flat = grad.reshape(-1)
        whole = self.numel // self.tile
        end = whole * self.tile
        total = self._project_tiles(slice(0, whole), flat[:end].view(whole, self.tile))
        if end < self.numel:
            last = torch.zeros(1, self.tile, dtype=grad.dtype, device=grad.device)
            last[0, : self.numel - end] = flat[end:]
            total += self._project_tiles(slice(whole, whole + 1), last)
        return total - total.mean()

    def centre(self) -> Tensor:
        return self.centre_TB.view(-1)[: self.numel]

    def to(self, device: torch.device | str) -> None:
        self.codes, self.centre_TB = self.codes.to(device), self.centre_TB.to(device)
        self.scales = None if self.scales is None else self.scales.to(device)

    def _combine_tiles(self, where: slice, weights_N: Tensor, out_TB: Tensor) -> None:
        scales = None if self.scales is None else self.scales[where]
        self.kernels.combine(self.codes[where], scales, self.bits, weights_N, self.centre_TB[where], out_TB)

    def _project_tiles(self, where: slice, grad_TB: Tensor) -> Tensor:
        scales = None if self.scales is None else self.scales[where]
        return self.kernels.project(self.codes[where], scales, self.bits, grad_TB)


def large_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros of a shape, on huge pages where Linux has them: many rows at once are read faster."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
