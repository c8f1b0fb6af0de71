"""`combine` and `project` on tiles of deltas that are held in few bits: one fused pass where torch can compile it.

Legend: T tiles, N checkpoints, B elements of a tile. Codes of one tile lie together, all checkpoints of it, so that
either product reads the basis once, in order. Both run on a few tiles at a time: what they write is still in the cache
when it is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from twa_merge.quantize import dequantize, halves

_COMPILED_TILES = 128
_PLAIN_ELEMENTS = 1 << 20


class Kernels:
    """The two products on tiles.

    Args:
        compile: by `torch.compile` (C++ on CPUs, Triton on GPUs), which takes seconds at first; plain torch otherwise,
            and where no compiler is found.
    """

    def __init__(self, *, compile: bool) -> None:
        self._combine: Callable[..., Any] | None = torch.compile(_combine) if compile else None
        self._project: Callable[..., Any] | None = torch.compile(_project) if compile else None

    @property
    def compiled(self) -> bool:
        """Whether compiled kernels are in use."""
        return self._combine is not None

    def combine(
        self, codes: Tensor, scales: Tensor | None, bits: int, weights_N: Tensor, centre_TB: Tensor, out_TB: Tensor
    ) -> None:
        """Write `centre + sum_k weights[k] * delta_k` into `out_TB`, of any float dtype."""
        for part in self._parts(codes):
            chosen = (codes[part], None if scales is None else scales[part])
            if self._combine is not None and self._try(
                self._combine, *chosen, bits, weights_N, centre_TB[part], out_TB[part]
            ):
                continue
            values = dequantize(*chosen, bits)
            out_TB[part] = centre_TB[part] + torch.matmul(weights_N, values)

    def project(self, codes: Tensor, scales: Tensor | None, bits: int, grad_TB: Tensor) -> Tensor:
        """Return the (N,) float32 inner products of a gradient, of any float dtype, with the deltas."""
        total = torch.zeros(codes.shape[1], dtype=torch.float32, device=codes.device)
        for part in self._parts(codes):
            chosen = (codes[part], None if scales is None else scales[part])
            if self._project is not None and self._try(self._project, *chosen, bits, grad_TB[part], total):
                continue
            values = dequantize(*chosen, bits)
            total += torch.matmul(values, grad_TB[part].float().unsqueeze(-1)).squeeze(-1).sum(dim=0)
        return total

    def _parts(self, codes: Tensor) -> Iterator[slice]:
        per_tile = codes.shape[1] * codes.shape[2] * 2
        size = _COMPILED_TILES if self.compiled else max(1, _PLAIN_ELEMENTS // per_tile)
        for first in range(0, len(codes), size):
            yield slice(first, first + size)

    def _try(self, kernel: Callable[..., Any], *arguments: Any) -> bool:
        """Run a compiled kernel; False, for this time and for good, if it cannot be compiled here."""
        if len(arguments[0]) < 2:  # one tile alone would be compiled for itself
            return False
        for tensor in arguments:
            if isinstance(tensor, Tensor) and tensor.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
                for dimension in range(1, tensor.dim()):
                    torch._dynamo.mark_static(tensor, dimension)
        try:
            kernel(*arguments)
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError, OSError) as error:
            self._combine = self._project = None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            warnings.warn(f"torch.compile does not work here, slower plain kernels are used ({reason})", stacklevel=2)
            return False
        return True


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
