"""Block-wise quantisation of deltas, and nothing else: codes of 8 or 4 bits, a scale for each block of each checkpoint.

Legend: T tiles, N checkpoints, B elements of a tile, a multiple of two blocks.

The element of largest magnitude in a block becomes the lowest code, so that all codes are used, and an outlier of one
checkpoint costs its own block of 64 elements alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
"""Elements that share a scale: 4 / 64 bytes each."""


def quantize(values_TNB: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales of float32 values.

    Args:
        values_TNB: (T, N, B) float32.
        bits: 8 or 4.

    Returns:
        Codes, (T, N, B) int8, or (T, N, B / 2) uint8 with the first half of the tile in the low four bits and the
        second in the high ones; scales, (T, N, B / 64) float32.
    """
    blocks = values_TNB.view(*values_TNB.shape[:2], -1, BLOCK)
    high, low = blocks.amax(dim=-1), blocks.amin(dim=-1)
    lowest = -(1 << (bits - 1))
    scales = torch.where(high > -low, high, low) / lowest
    safe = torch.where(scales == 0, 1.0, scales)
    codes = (blocks / safe.unsqueeze(-1)).round_().clamp_(lowest, -lowest - 1).flatten(-2)
    if bits == 8:
        return codes.to(torch.int8), scales
    first, second = (codes - lowest).to(torch.uint8).chunk(2, dim=-1)
    return first | (second << 4), scales


def halves(codes: Tensor, bits: int) -> list[Tensor]:
    """Return the unscaled values of codes in float32, in one piece, or for four bits in two halves of the tile."""
    if bits == 4:
        return [(codes & 15).float() - 8, (codes >> 4).float() - 8]
    return [codes.float()]


def dequantize(codes: Tensor, scales: Tensor | None, bits: int) -> Tensor:
    """Return (T, N, B) float32 values; without scales the codes are the values in another dtype."""
    values = torch.cat(halves(codes, bits), dim=-1)
    if scales is None:
        return values
    scaled: Tensor = values.view(*scales.shape, BLOCK) * scales.unsqueeze(-1)
    return scaled.flatten(-2)
