"""The exact merge: plan from headers, validate, stream in float64 tiles, publish atomically.

No merged element ever exists in less than float64 until it is rounded once to the output dtype, and no more than a
few tiles are in memory at a time, whatever the size of the model or the number of checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from twa_merge.alignment import SoupTensor
from twa_merge.checkpoints import Soup
from twa_merge.errors import UserError
from twa_merge.mixing import MixingWeights
from twa_merge.plan import PlannedTensor, plan
from twa_merge.publish import copy_side_files, publish
from twa_merge.tensorfile import RangeReader, TensorFileWriter

TILE = 1 << 17
"""Elements at a time: a float64 accumulator and one tile of a checkpoint stay in the cache of a core."""
MAX_SHARD_BYTES = 5_000_000_000


def write(
    soup: Soup,
    weights: MixingWeights,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
    progress: bool = False,
) -> Path:
    """Write the merged model with config, tokenizer and `mixing_weights.*` into the new folder `output`.

    Args:
        soup: the original checkpoints; they are read in tiles.
        weights: the merge.
        output: must not exist unless `overwrite`; appears only when complete.
        dtype: of floating point tensors; default as in the checkpoints.
        max_shard_bytes: above this size the model is sharded, with an index.
        finish: called with the unfinished folder before it is published, to add files to it.

    Raises:
        UserError: the table does not fit, the output exists, or a checkpoint holds a NaN or differs in an integer.
        OSError: the disk failed; nothing is left behind.
    """
    planned = plan(soup, weights, dtype)
    output = Path(output).expanduser()
    with publish(output, soup, overwrite=overwrite) as folder:
        _write_model(planned, soup.labels, folder, max_shard_bytes, progress=progress)
        if soup.folder is not None:
            copy_side_files(soup.folder, folder, dtype or _changed_dtype(planned))
        replace(weights, fingerprints=soup.fingerprints, revisions=soup.revisions).save(folder)
        if finish is not None:
            finish(folder)
    return output


def _changed_dtype(planned: list[PlannedTensor]) -> torch.dtype | None:
    """Return the dtype of the merge where it is not that of the first checkpoint, whose config names its own."""
    floats = [item for item in planned if item.source.is_float]
    written = {item.dtype for item in floats}
    if len(written) != 1 or written == {item.source.entries[0].dtype for item in floats}:
        return None
    return written.pop()


def shard_bytes(gigabytes: float) -> int:
    """Return a user's `max_shard_gb` in bytes."""
    if not 0 < gigabytes < float("inf"):
        raise UserError(f"max_shard_gb: expected a number above 0, got {gigabytes}")
    return math.ceil(gigabytes * 1e9)


def _write_model(
    planned: list[PlannedTensor], labels: tuple[str, ...], folder: Path, max_shard_bytes: int, *, progress: bool
) -> None:
    shards = _split(planned, max_shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with _bar(sum(item.nbytes for item in planned), progress) as advance:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(shard, labels, folder / name, advance)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(item.nbytes for item in planned)},
            "weight_map": {item.source.name: n for n, shard in zip(names, shards, strict=True) for item in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(planned: list[PlannedTensor], max_shard_bytes: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for item in planned:
        if shards[-1] and size + item.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards


def _write_shard(
    shard: list[PlannedTensor], labels: tuple[str, ...], path: Path, advance: Callable[[int], None]
) -> None:
    declared = {item.source.name: (item.dtype, item.source.entries[0].shape) for item in shard}
    with _Mixer(labels) as mixer:
        writer = TensorFileWriter(path, declared)
        try:
            for item in shard:
                for tile in mixer.tiles(item):
                    writer.append(tile)
                    advance(tile.numel() * tile.dtype.itemsize)
        except BaseException:
            writer.abandon()
            raise
        writer.close()


class _Mixer:
    """Merges one tensor after another, tile by tile, in buffers that are made once."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.labels = labels
        self._reader = RangeReader()
        self._part = torch.empty(TILE, dtype=torch.float64)
        self._total = torch.empty(TILE, dtype=torch.float64)
        self._out = torch.empty(TILE * 8, dtype=torch.uint8)

    def __enter__(self) -> _Mixer:
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.__exit__(*error)

    def tiles(self, item: PlannedTensor) -> Iterator[Tensor]:
        """Yield the merged tensor in flat pieces; a piece is valid until the next one is asked for."""
        if item.value is not None:
            value = item.value.to(item.dtype)
            _require_fits(item, value, item.value)
            yield value
            return
        entries = item.source.entries
        members = [(k, float(w)) for k, w in enumerate(item.weights_N) if w != 0]
        for first in range(0, entries[0].numel, TILE):
            count = min(TILE, entries[0].numel - first)
            if len(members) == 1 and members[0][1] == 1:
                yield self._copied(item, members[0][0], first, count)
                continue
            merged = self._merged(item.source, members, first, count)
            out = self._out[: count * item.dtype.itemsize].view(item.dtype).copy_(merged)
            _require_fits(item, out, merged)
            yield out

    def _merged(self, tensor: SoupTensor, members: list[tuple[int, float]], first: int, count: int) -> Tensor:
        """Return the float64 sum of weight times value, in the order of the checkpoints."""
        total, part = self._total[:count].zero_(), self._part[:count]
        for k, weight in members:
            total.add_(part.copy_(self._reader.read(tensor.entries[k], first, count)), alpha=weight)
        if not torch.isfinite(total.sum()):
            self._keep_infinities(tensor, first, total)
        return total

    def _copied(self, item: PlannedTensor, k: int, first: int, count: int) -> Tensor:
        own = self._reader.read(item.source.entries[k], first, count)
        value = own.to(item.dtype)
        _require_fits(item, value, own)
        if item.source.is_float and not torch.isfinite(own.sum()):
            value = value.clone()  # the buffer is read into again
            self._keep_infinities(item.source, first, torch.zeros(count, dtype=torch.float64))
        if item.must_be_equal:
            value = value.clone()  # the buffer is read into again
            self._require_equal(item.source, value, first)
        return value

    def _require_equal(self, tensor: SoupTensor, value: Tensor, first: int) -> None:
        for label, entry in zip(self.labels, tensor.entries, strict=True):
            if not torch.equal(self._reader.read(entry, first, value.numel()).to(value.dtype), value):
                raise UserError(f"integer tensor {tensor.name!r} differs in {label}: integers have no average")

    def _keep_infinities(self, tensor: SoupTensor, first: int, total: Tensor) -> None:
        """Put into a sum the infinities that all checkpoints share, as masks do.

        Raises:
            UserError: a checkpoint holds NaN, or an infinity that another does not.
        """
        kept = self._reader.read(tensor.entries[0], first, len(total)).double()
        kept[torch.isfinite(kept)] = 0
        for label, entry in zip(self.labels, tensor.entries, strict=True):
            value = self._reader.read(entry, first, len(total)).double()
            if not torch.equal(torch.where(torch.isfinite(value), 0, value), kept):  # NaN is not equal to itself
                raise UserError(f"{label}: tensor {tensor.name!r} holds NaN or infinity; leave this checkpoint out")
        total[kept != 0] = kept[kept != 0]


def _require_fits(item: PlannedTensor, value: Tensor, exact: Tensor) -> None:
    if item.dtype == torch.float16 and not torch.equal(torch.isfinite(value), torch.isfinite(exact)):
        raise UserError(
            f"tensor {item.source.name!r}: the merge holds numbers beyond 65504, which float16 has not; "
            "use bfloat16 or float32 as dtype"
        )


@contextlib.contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[int], None]]:
    if not progress:
        yield lambda nbytes: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", delay=2, disable=None) as bar:

        def advance(nbytes: int) -> None:
            bar.update(nbytes)

        yield advance
