"""Which storage the deltas of a soup get: what the user names, or the most exact that fits.

Legend: N checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from twa_merge.blocks import Block, FloatBlock, TiledBlock
from twa_merge.errors import UserError
from twa_merge.kernels import Kernels

if TYPE_CHECKING:
    from twa_merge.checkpoints import Soup
from twa_merge.quantize import BLOCK

BITS = {"bfloat16": 16, "int8": 8, "int4": 4}
IN_MEMORY = ("float32", *BITS)
"""From exact to small."""
STORAGES = (*IN_MEMORY, "disk")
_WORTH_COMPILING = 1 << 27
"""Elements of a basis: below that, a hundred steps of plain kernels take less time than the compiler."""


def check_storage(storage: str) -> None:
    """Raise unless this is the name of a storage."""
    if storage not in STORAGES:
        raise UserError(f"storage: expected auto or one of {', '.join(STORAGES)}, got {storage!r}")


def block_maker(storage: str, num_checkpoints: int, numel: int) -> Callable[[int], Block]:
    """Return what makes the block of a parameter of a given number of elements.

    Args:
        storage: one of `IN_MEMORY`.
        num_checkpoints: N.
        numel: elements of all parameters.
    """
    kernels = kernels_for(num_checkpoints, numel)
    if storage == "float32":
        return lambda size: FloatBlock(num_checkpoints, size, kernels)
    return lambda size: TiledBlock(num_checkpoints, size, BITS[storage], kernels)


def kernels_for(num_checkpoints: int, numel: int) -> Kernels:
    """Return kernels that are compiled if the basis has so many elements that it pays."""
    return Kernels(compile=num_checkpoints * numel >= _WORTH_COMPILING)


def bytes_of(storage: str, num_checkpoints: int, numel: int) -> int:
    """Return the bytes of a basis, its centre included."""
    if storage == "disk":
        return 0
    if storage == "float32":  # the last delta is not held
        return 4 * numel * num_checkpoints
    of_delta = {"bfloat16": 2, "int8": 1 + 4 / BLOCK, "int4": 0.5 + 4 / BLOCK}[storage]
    return round(numel * (num_checkpoints * of_delta + 4))


def choose_storage(num_checkpoints: int, numel: int, free: int) -> tuple[str, str]:
    """Return the most exact storage whose basis takes at most half of the free memory, and a line that says why.

    Args:
        num_checkpoints: N.
        numel: elements of all parameters.
        free: bytes of free memory where the basis will be.
    """
    sizes = {storage: bytes_of(storage, num_checkpoints, numel) for storage in STORAGES}
    chosen = next(storage for storage, size in sizes.items() if size <= max(0, free) / 2)
    line = f"storage: {chosen}, {sizes[chosen] / 1e9:.2f} GB of {free / 1e9:.1f} GB free"
    if chosen != STORAGES[0]:
        larger = STORAGES[STORAGES.index(chosen) - 1]
        line += f" ({larger} would take {sizes[larger] / 1e9:.2f} GB, more than half)"
    return chosen, line


def storage_for(soup: Soup, free: int, *, processes: int = 1) -> tuple[str, str]:
    """Return the storage that `auto` means for a soup, and a line that says why.

    Args:
        soup: the checkpoints.
        free: bytes of free memory for each process.
        processes: that share a basis.
    """
    numel = sum(tensor.entries[0].numel for tensor in soup.tensors if tensor.is_float)
    return choose_storage(len(soup), -(-numel // processes), free)


def next_smaller(storage: str) -> str | None:
    """Return the storage that takes less memory, or None."""
    where = STORAGES.index(storage) + 1
    return STORAGES[where] if where < len(STORAGES) else None
