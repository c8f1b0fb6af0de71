"""safetensors files by byte range: validated headers, reads and writes in bounded memory.

The safetensors library reads through memory maps and writes from whole tensors in memory. A merge of many checkpoints
must do neither: mapped pages count as memory, and a whole model need not fit. The format is an 8-byte little-endian
length, a JSON header, and the raw tensors one after another.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from twa_merge.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, as its header declares it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def values(self, position: int, count: int) -> Tensor | None:
        """Return elements that are in memory; None for those of a file."""
        return None

    def pieces(self, position: int, count: int) -> Iterator[tuple[Entry, int, int]]:
        """Yield (tensor of a file, position in it, elements) of the elements `position .. position + count`."""
        yield self, position, count


@dataclass(frozen=True)
class JoinedEntry(Entry):
    """Several tensors, one after another, that are one tensor of the module (fused experts)."""

    parts: tuple[Entry, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[Entry], shape: tuple[int, ...]) -> JoinedEntry:
        """Return the tensor of a shape that the parts make up."""
        assert sum(part.numel for part in parts) == math.prod(shape) and len({part.dtype for part in parts}) == 1
        return cls(parts[0].file, parts[0].dtype, shape, parts[0].start, tuple(parts))

    def pieces(self, position: int, count: int) -> Iterator[tuple[Entry, int, int]]:
        for part in self.parts:
            if count <= 0:
                return
            if position < part.numel:
                size = min(count, part.numel - position)
                yield part, position, size
                position, count = 0, count - size
            else:
                position -= part.numel


@dataclass(frozen=True)
class Window:
    """Some elements of a flat tensor: `runs` runs of `run` elements, `period` apart, the first at `offset`."""

    runs: int
    run: int
    period: int
    offset: int

    @classmethod
    def whole(cls, numel: int) -> Window:
        """Return the window that is all of a tensor."""
        return cls(1, numel, numel, 0)

    @classmethod
    def slice(cls, shape: tuple[int, ...], dim: int, start: int, length: int) -> Window:
        """Return the window of `tensor.narrow(dim, start, length)`."""
        inner = math.prod(shape[dim + 1 :])
        return cls(math.prod(shape[:dim]), length * inner, shape[dim] * inner, start * inner)

    @property
    def numel(self) -> int:
        return self.runs * self.run

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield (position in the tensor, elements) of the window's elements `first .. first + count`, in order."""
        while count > 0:
            number, into = divmod(first, self.run)
            size = min(count, self.run - into)
            yield self.offset + number * self.period + into, size
            first, count = first + size, count - size


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file without reading their data.

    Raises:
        UserError: the file is truncated, corrupt, or of an unsupported dtype.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else None
        if length is None or length > min(_MAX_HEADER, size - 8):
            raise UserError(f"{path}: not a complete safetensors file ({size} bytes); download or save it again")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("header is not an object")
        header.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, info) for name, info in header.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: corrupt safetensors header ({error}); download or save it again") from error
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            raise UserError(f"{path}: corrupt safetensors header ({name!r} overlaps another tensor or leaves a gap)")
        end += entry.nbytes
    if end != size:
        raise UserError(
            f"{path}: truncated or corrupt: its header declares {end} bytes, the file has {size}; "
            "download or save it again"
        )
    return entries


def _entry(path: Path, base: int, info: Mapping[str, Any]) -> Entry:
    dtype = info["dtype"]
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not supported")
    shape = tuple(int(extent) for extent in info["shape"])
    start, end = info["data_offsets"]
    entry = Entry(path, DTYPES[dtype], shape, base + start)
    if min(shape, default=0) < 0 or start < 0 or end - start != entry.nbytes:
        raise ValueError(f"offsets {start}..{end} do not fit {dtype} of shape {list(shape)}")
    return entry


def read_range(file: BinaryIO, entry: Entry, first: int, out: Tensor) -> None:
    """Read elements `first ..` of a tensor into `out`, a contiguous tensor of its dtype.

    Args:
        file: the tensor's file, opened unbuffered for reading.
    """
    assert out.dtype == entry.dtype
    if not out.numel():
        return
    view = memoryview(out.view(-1).view(torch.uint8).numpy().data)
    file.seek(entry.start + first * entry.dtype.itemsize)
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise UserError(f"{entry.file}: file ended while it was being read; did it change meanwhile?")
        done += got


class RangeReader:
    """Reads parts of tensors; every file is opened once. A context manager."""

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._raw = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()

    def read(self, entry: Entry, first: int, count: int, window: Window | None = None) -> Tensor:
        """Return elements `first .. first + count`, flat, in a buffer that the next call overwrites.

        Args:
            window: count elements in this part of the tensor.
        """
        nbytes = count * entry.dtype.itemsize
        if len(self._raw) < nbytes:
            self._raw = torch.empty(nbytes, dtype=torch.uint8)
        out = self._raw[:nbytes].view(entry.dtype)
        done = 0
        for start, length in (window or Window.whole(entry.numel)).pieces(first, count):
            for part, position, size in entry.pieces(start, length):
                held = part.values(position, size)
                if held is None:
                    read_range(self._file(part.file), part, position, out[done : done + size])
                else:
                    out[done : done + size] = held
                done += size
        return out

    def _file(self, path: Path) -> BinaryIO:
        if path not in self._files:
            self._files[path] = path.open("rb", buffering=0)
        return self._files[path]


def read_tensor(entry: Entry) -> Tensor:
    """Return one whole tensor in its own dtype and shape."""
    return read_head(entry, entry.numel).view(entry.shape)


def read_head(entry: Entry, count: int) -> Tensor:
    """Return the first `count` elements of a tensor, flat."""
    with RangeReader() as reader:
        return reader.read(entry, 0, count)


class TensorFileWriter:
    """Writes one safetensors file whose tensors arrive in pieces, in the order they were declared."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in tensors.items():
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._expected = 8 + len(raw) + end
        self._file = path.open("wb", buffering=0)
        self._write(struct.pack("<Q", len(raw)) + raw)

    def append(self, piece: Tensor) -> None:
        """Append a contiguous piece of the next tensor's data."""
        if piece.numel():
            self._write(piece.reshape(-1).view(torch.uint8).numpy().data)

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def close(self) -> None:
        """Flush to disk; the file must be complete by now."""
        complete = self._file.tell() == self._expected
        if complete:
            os.fsync(self._file.fileno())
        self._file.close()
        assert complete, "the tensors appended do not add up to those declared"

    def abandon(self) -> None:
        """Close without the check, after an error."""
        self._file.close()
