"""`combine` and `project` on stored deltas: one fused pass where torch can compile it.

Legend: R rows, T tiles, N checkpoints, B elements of a tile. Codes of one tile lie together, all checkpoints of it, so
that either product reads the basis once, in order. Both run on a few tiles at a time: what they write is still in the
cache when it is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from twa_merge.memory import is_out_of_memory
from twa_merge.quantize import dequantize, halves

_COMPILED_ELEMENTS = 1 << 20
_PLAIN_ELEMENTS = 1 << 20
PIECES = 8
"""What compiled kernels take at a time of tensors that lie apart; a kernel for each number would be many."""
_WORTH_A_CALL = 1 << 18
"""Elements of a row: below that, BLAS is faster."""
_ROWS, _PIECE = 16, 1 << 17
"""A processor follows some 16 streams of memory at once; of more rows, pieces are summed in the cache."""


class Kernels:
    """The products that are worth compiling.

    Args:
        compile: by `torch.compile` (C++ on CPUs, Triton on GPUs), which takes seconds at first; plain torch otherwise,
            and where no compiler is found.
    """

    def __init__(self, *, compile: bool) -> None:
        kernels = (_combine, _project, _combine_rows, _add_rows, _add_pieces, _project_pieces)
        self._compiled: dict[Callable[..., None], Any] = {k: torch.compile(k) for k in kernels} if compile else {}

    @property
    def compiled(self) -> bool:
        """Whether compiled kernels are in use."""
        return bool(self._compiled)

    def combine_rows(self, rows_RD: Tensor, weights_R: Tensor, centre_D: Tensor, out_D: Tensor) -> bool:
        """Write `centre + sum_r weights[r] * rows[r]` into `out_D`; False if it is not worth it, or cannot be compiled.

        On CPUs it reads the rows in two thirds of the time that BLAS takes.
        """
        size = len(out_D)
        parts = -(-len(rows_RD) // _ROWS)
        if rows_RD.device.type != "cpu" or size < _WORTH_A_CALL or (parts > 1 and out_D.dtype != torch.float32):
            return False
        chunks = list(zip(rows_RD.chunk(parts), weights_R.chunk(parts), strict=True))
        piece = size if parts == 1 else _PIECE
        centre, out = centre_D.unsqueeze(0), out_D.unsqueeze(0)
        for first in range(0, size, piece):
            where = slice(first, first + piece)
            done = self._run(_combine_rows, -1, chunks[0][0][:, where], chunks[0][1], centre[:, where], out[:, where])
            for rows, weights in chunks[1:]:
                # a kernel of its own: torch.compile is wrong where two arguments share memory
                done = done and self._run(_add_rows, -1, rows[:, where], weights, out[:, where])
            if not done:
                return False  # the caller computes all of it again
        return True

    def add_pieces(self, pieces: list[Tensor], weights: list[float], total_D: Tensor) -> None:
        """Add `sum_i weights[i] * pieces[i]`, pieces of any float dtype that lie apart, to a float32 total."""
        done = 0
        while len(pieces) - done >= PIECES:
            some = slice(done, done + PIECES)
            row = torch.tensor(weights[some], dtype=torch.float32, device=total_D.device)
            if not self._run(_add_pieces, 0, total_D, pieces[some], row):
                break
            done += PIECES
        for piece, weight in zip(pieces[done:], weights[done:], strict=True):
            total_D.add_(piece, alpha=weight)

    def project_pieces(self, pieces: list[Tensor], start_D: Tensor, grad_D: Tensor) -> Tensor:
        """Return float32 inner products of a float32 gradient with `pieces[i] - start`."""
        found, done = [], 0
        while len(pieces) - done >= PIECES:
            products = torch.zeros(PIECES, device=grad_D.device)
            if not self._run(_project_pieces, 0, grad_D, pieces[done : done + PIECES], start_D, products):
                break
            found.append(products)
            done += PIECES
        start_D, difference = start_D.float(), torch.empty_like(grad_D)
        for piece in pieces[done:]:
            torch.sub(piece.float(), start_D, out=difference)
            found.append(torch.dot(difference, grad_D).unsqueeze(0))
        return torch.cat(found)

    def combine(
        self, codes: Tensor, scales: Tensor | None, bits: int, weights_N: Tensor, centre_TB: Tensor, out_TB: Tensor
    ) -> None:
        """Write `centre + sum_k weights[k] * delta_k` into `out_TB`, of any float dtype."""
        for part in self._parts(codes, centre_TB.shape[1]):
            chosen = (codes[part], None if scales is None else scales[part])
            if not self._run(_combine, 0, *chosen, bits, weights_N, centre_TB[part], out_TB[part]):
                out_TB[part] = centre_TB[part] + torch.matmul(weights_N, dequantize(*chosen, bits))

    def project(self, codes: Tensor, scales: Tensor | None, bits: int, grad_TB: Tensor) -> Tensor:
        """Return the (N,) float32 inner products of a gradient, of any float dtype, with the deltas."""
        total = torch.zeros(codes.shape[1], dtype=torch.float32, device=codes.device)
        for part in self._parts(codes, grad_TB.shape[1]):
            chosen = (codes[part], None if scales is None else scales[part])
            products = torch.zeros_like(total)  # a kernel that fails half way leaves nothing in the total
            if not self._run(_project, 0, *chosen, bits, grad_TB[part], products):
                values = dequantize(*chosen, bits)
                products = torch.matmul(values, grad_TB[part].float().unsqueeze(-1)).squeeze(-1).sum(dim=0)
            total += products
        return total

    def _parts(self, codes: Tensor, tile: int) -> Iterator[slice]:
        per_tile = codes.shape[1] * tile
        if codes.device.type == "cpu":
            size = _COMPILED_ELEMENTS // tile if self.compiled else max(1, _PLAIN_ELEMENTS // per_tile)
        else:  # one launch; without a compiler a few, of bounded memory
            size = max(1, len(codes)) if self.compiled else max(1, 64 * _PLAIN_ELEMENTS // per_tile)
        for first in range(0, len(codes), size):
            yield slice(first, first + size)

    def _run(self, kernel: Callable[..., None], dynamic: int, *arguments: Any) -> bool:
        """Run a compiled kernel, one for every size of a dimension; False, for good, if it cannot be compiled here."""
        compiled = self._compiled.get(kernel)
        if compiled is None or arguments[0].shape[dynamic] < 2:  # a size of one would be compiled for itself
            return False
        for tensor in arguments:
            if isinstance(tensor, Tensor) and tensor.dim() > 1:
                for dimension in range(tensor.dim()):
                    if dimension == dynamic % tensor.dim():
                        torch._dynamo.maybe_mark_dynamic(tensor, dimension)
                    else:
                        torch._dynamo.mark_static(tensor, dimension)
        try:
            compiled(*arguments)
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError, OSError) as error:
            if is_out_of_memory(error):
                raise
            self._compiled = {}
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            warnings.warn(f"torch.compile does not work here, slower plain kernels are used ({reason})", stacklevel=2)
            return False
        return True


def _combine_rows(rows_RD: Tensor, weights_R: Tensor, centre_1D: Tensor, out_1D: Tensor) -> None:
    total = centre_1D[0]
    for row in range(len(rows_RD)):
        total = total + rows_RD[row] * weights_R[row]
    out_1D[0] = total


def _add_rows(rows_RD: Tensor, weights_R: Tensor, out_1D: Tensor) -> None:
    total = out_1D[0]
    for row in range(len(rows_RD)):
        total = total + rows_RD[row] * weights_R[row]
    out_1D[0] = total


def _add_pieces(total_D: Tensor, pieces: list[Tensor], weights: Tensor) -> None:
    total = total_D
    for i in range(PIECES):
        total = total + pieces[i].float() * weights[i]
    total_D.copy_(total)


def _project_pieces(grad_D: Tensor, pieces: list[Tensor], start_D: Tensor, products: Tensor) -> None:
    for i in range(PIECES):
        products[i] += ((pieces[i].float() - start_D.float()) * grad_D).sum()


def _combine(
    codes: Tensor, scales: Tensor | None, bits: int, weights_N: Tensor, centre_TB: Tensor, out_TB: Tensor
) -> None:
    values = halves(codes, bits)
    size = values[0].shape[-1]
    for i, part in enumerate(values):
        where = slice(i * size, (i + 1) * size)
        if scales is None:
            change = (part * weights_N[None, :, None]).sum(1)
        else:
            count = scales.shape[2] // len(values)
            weighted = scales[:, :, i * count : (i + 1) * count] * weights_N[None, :, None]
            change = (part.view(*weighted.shape, -1) * weighted.unsqueeze(-1)).sum(1).flatten(-2)
        out_TB[:, where] = centre_TB[:, where] + change


def _project(codes: Tensor, scales: Tensor | None, bits: int, grad_TB: Tensor, total_N: Tensor) -> None:
    values = halves(codes, bits)
    size = values[0].shape[-1]
    for i, part in enumerate(values):
        grad = grad_TB[:, i * size : (i + 1) * size].float()
        if scales is None:
            total_N += (part * grad.unsqueeze(1)).sum(-1).sum(0)
        else:
            count = scales.shape[2] // len(values)
            of_part = scales[:, :, i * count : (i + 1) * count]
            products = (part.view(*of_part.shape, -1) * grad.reshape(len(grad), 1, count, -1)).sum(-1)
            total_N += (products * of_part).sum(-1).sum(0)
