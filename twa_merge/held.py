"""Checkpoints of one run held in memory: the first as it is, the others as differences from it in few bits.

Legend: T tiles of B elements.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from twa_merge.errors import UserError
from twa_merge.quantize import BLOCK, dequantize, quantize
from twa_merge.tensorfile import Entry

_TILE = 4096
"""Elements of a tile; of small tensors fewer."""
_SMALL = 2 * BLOCK
"""Tensors of fewer elements are held as they are."""
_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class HeldEntry(Entry):
    """A tensor in memory: `base`, or `base + codes * scales`, rounded to its dtype."""

    base: Tensor
    """Flat, of the tensor's dtype."""
    codes: Tensor | None = None
    """(T, 1, B), or (T, 1, B / 2) for four bits."""
    scales: Tensor | None = None
    """(T, 1, B / 64)."""
    bits: int = 8

    def values(self, position: int, count: int) -> Tensor:
        """Return elements `position ..`, flat, not to be written to."""
        base = self.base[position : position + count]
        if self.codes is None or self.scales is None or count == 0:
            return base
        tile = self.scales.shape[2] * BLOCK
        first = position // tile
        tiles = slice(first, (position + count - 1) // tile + 1)
        change = dequantize(self.codes[tiles], self.scales[tiles], self.bits).flatten()
        start = position - first * tile
        return (base.float() + change[start : start + count]).to(base.dtype)


class HeldCheckpoints:
    """Checkpoints by step.

    Args:
        storage: of the differences: `int8` or `int4`.
    """

    def __init__(self, storage: str) -> None:
        if storage not in _BITS:
            raise UserError(f"snapshots: storage: expected disk, int8 or int4, got {storage!r}")
        self.bits = _BITS[storage]
        self._base: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._held: dict[int, dict[str, tuple[Tensor, ...]]] = {}
        """Step -> name -> codes and scales; the value itself; or nothing, where it is the base's."""

    @property
    def steps(self) -> list[int]:
        return sorted(self._held)

    @property
    def nbytes(self) -> int:
        held = [tensor for tensors in self._held.values() for parts in tensors.values() for tensor in parts]
        return sum(tensor.nbytes for tensor in (*held, *self._base.values()))

    def add(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Hold a checkpoint; its tensors are copied."""
        if not self._base:
            self._base = {name: tensor.detach().flatten().clone() for name, tensor in state.items()}
            self._shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            self._held[step] = dict.fromkeys(state, ())
            return
        self._held[step] = {name: self._packed(name, tensor.detach().flatten()) for name, tensor in state.items()}

    def remove(self, step: int) -> None:
        """Drop a checkpoint; what the others differ from stays as long as there are any."""
        del self._held[step]
        if not self._held:
            self._base, self._shapes = {}, {}

    def header(self, step: int) -> dict[str, Entry]:
        """Return a checkpoint's tensors, as `read_header` does those of a file."""
        found: dict[str, Entry] = {}
        for name, parts in self._held[step].items():
            base, shape = self._base[name], self._shapes[name]
            codes, scales = parts if len(parts) == 2 else (None, None)
            base = parts[0] if len(parts) == 1 else base
            found[name] = HeldEntry(
                Path(f"snapshot-{step}"), base.dtype, shape, 0, base, codes=codes, scales=scales, bits=self.bits
            )
        return found

    def save(self, path: Path) -> None:
        """Write all checkpoints into one file."""
        from safetensors.torch import save_file

        tensors = {f"base.{name}": tensor for name, tensor in self._base.items()}
        for step, held in self._held.items():
            for name, parts in held.items():
                tensors |= {f"{step}.{i}.{name}": part for i, part in enumerate(parts)}
        about = {"bits": self.bits, "shapes": self._shapes, "steps": self.steps}
        unfinished = path.with_name(f".{path.name}")
        save_file(tensors, unfinished, {"held": json.dumps(about)})
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        """Hold what was written, and nothing else.

        Raises:
            UserError: the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["held"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            bits = about["bits"]
            shapes = {name: tuple(shape) for name, shape in about["shapes"].items()}
            base = {name: tensors[f"base.{name}"] for name in shapes}
            held = {
                step: {
                    name: tuple(tensors[f"{step}.{i}.{name}"] for i in range(2) if f"{step}.{i}.{name}" in tensors)
                    for name in shapes
                }
                for step in about["steps"]
            }
        except (SafetensorError, KeyError, TypeError) as error:
            raise UserError(f"snapshots: {path}: damaged ({error}); resume from an earlier checkpoint") from error
        self.bits, self._shapes, self._base, self._held = bits, shapes, base, held

    def _packed(self, name: str, flat: Tensor) -> tuple[Tensor, ...]:
        if not flat.dtype.is_floating_point or flat.numel() < _SMALL:
            return (flat.clone(),)
        codes, scales = [], []
        tile = min(_TILE, -(-flat.numel() // _SMALL) * _SMALL)
        for first in range(0, flat.numel(), 64 * tile):  # in bounded memory
            part = slice(first, first + 64 * tile)
            change = flat[part].float() - self._base[name][part].float()
            padded = torch.nn.functional.pad(change, (0, -len(change) % tile)).view(-1, 1, tile)
            found = quantize(padded, self.bits)
            codes.append(found[0])
            scales.append(found[1])
        return torch.cat(codes), torch.cat(scales)
