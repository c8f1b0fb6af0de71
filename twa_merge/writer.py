"""The exact merge: plan from headers, validate, stream in float64 tiles, publish atomically.

No merged element ever exists in less than float64 until it is rounded once to the output dtype, and no more than a
few tiles are in memory at a time, whatever the size of the model or the number of checkpoints.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from twa_merge.checkpoints import Soup, SoupTensor
from twa_merge.errors import UserError
from twa_merge.mixing import MixingWeights
from twa_merge.publish import copy_side_files, publish
from twa_merge.tensorfile import Entry, TensorFileWriter, read_range

TILE = 1 << 17
"""Elements at a time: a float64 accumulator and one tile of a checkpoint stay in the cache of a core."""
MAX_SHARD_BYTES = 5_000_000_000

OUTPUT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def output_dtype(name: str | None) -> torch.dtype | None:
    """Return the torch dtype of a user's name for it; None stays None."""
    if name is not None and name not in OUTPUT_DTYPES:
        raise UserError(f"dtype: expected one of {', '.join(OUTPUT_DTYPES)}, got {name!r}")
    return None if name is None else OUTPUT_DTYPES[name]


@dataclass(frozen=True)
class PlannedTensor:
    """How one tensor of the output is made."""

    source: SoupTensor
    dtype: torch.dtype
    weights_N: Tensor
    """(N,) float64."""
    value: Tensor | None
    """A recomputed statistic that takes the place of the merge."""
    must_be_equal: bool
    """Integer tensors have no average."""

    @property
    def nbytes(self) -> int:
        return self.source.entries[0].numel * self.dtype.itemsize


def plan(soup: Soup, weights: MixingWeights, dtype: torch.dtype | None = None) -> list[PlannedTensor]:
    """Work out every tensor of the output from headers alone.

    Without `dtype`, floating point tensors keep the dtype of the first checkpoint that has a weight.

    Raises:
        UserError: the table does not fit the soup.
    """
    _require_same_checkpoints(soup, weights)
    lead = int((weights.table != 0).any(dim=0).to(torch.uint8).argmax())
    planned = [_plan_tensor(soup, tensor, weights, lead, dtype) for tensor in soup.tensors]
    # The order of the safetensors library: wide dtypes first, so that every tensor is aligned.
    return sorted(planned, key=lambda item: (-item.dtype.itemsize, item.source.name))


def _require_same_checkpoints(soup: Soup, weights: MixingWeights) -> None:
    if weights.num_checkpoints != len(soup):
        raise UserError(
            f"the mixing weights are for {weights.num_checkpoints} checkpoints ({', '.join(weights.checkpoints)}), "
            f"got {len(soup)}"
        )
    for k, expected in enumerate(weights.fingerprints):
        if soup.fingerprints[k] == expected:
            continue
        hint = "give the checkpoints that the table was made for, in their order"
        if expected in soup.fingerprints:
            hint = f"it is {soup.labels[soup.fingerprints.index(expected)]}: the order differs"
        raise UserError(f"{soup.labels[k]}: is not checkpoint {k + 1} of the table ({weights.checkpoints[k]}); {hint}")


def _plan_tensor(
    soup: Soup, tensor: SoupTensor, weights: MixingWeights, lead: int, dtype: torch.dtype | None
) -> PlannedTensor:
    own = tensor.entries[lead].dtype
    if not tensor.is_float:
        chosen = torch.zeros(len(soup), dtype=torch.float64)
        chosen[lead] = 1
        counter = tensor.name.endswith("num_batches_tracked")
        return PlannedTensor(tensor, own, chosen, None, must_be_equal=not counter)
    if not weights.statistics and len(weights.groups) == 1:  # one row fits all: no need to know the module's names
        return PlannedTensor(tensor, dtype or own, weights.table[0], None, must_be_equal=False)
    names = soup.parameters_of(tensor.name)
    value = next((weights.statistics[name] for name in names if name in weights.statistics), None)
    rows = [weights.row(name) for name in names if weights.knows(name)] or [weights.table.mean(dim=0)]
    if any(not torch.equal(row, rows[0]) for row in rows[1:]):
        raise UserError(
            f"tensor {tensor.name!r} holds {', '.join(names)}, whose mixing weights differ; cannot be split"
        )
    if value is not None and tuple(value.shape) != tensor.entries[0].shape:
        raise UserError(f"statistic {tensor.name!r}: the mixing weights hold shape {list(value.shape)}; another model?")
    return PlannedTensor(tensor, dtype or own, rows[0], value, must_be_equal=False)


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
    with publish(Path(output), soup, overwrite=overwrite) as folder:
        _write_model(planned, soup.labels, folder, max_shard_bytes, progress=progress)
        if soup.folder is not None:
            copy_side_files(soup.folder, folder, dtype)
        replace(weights, fingerprints=soup.fingerprints).save(folder)
        if finish is not None:
            finish(folder)
    return Path(output)


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
        self._files: dict[Path, BinaryIO] = {}
        self._raw = torch.empty(TILE * 8, dtype=torch.uint8)
        self._part = torch.empty(TILE, dtype=torch.float64)
        self._total = torch.empty(TILE, dtype=torch.float64)
        self._out = torch.empty(TILE * 8, dtype=torch.uint8)

    def __enter__(self) -> _Mixer:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()

    def tiles(self, item: PlannedTensor) -> Iterator[Tensor]:
        """Yield the merged tensor in flat pieces; a piece is valid until the next one is asked for."""
        if item.value is not None:
            yield item.value.to(item.dtype)
            return
        entries = item.source.entries
        members = [(k, float(w)) for k, w in enumerate(item.weights_N) if w != 0]
        for first in range(0, entries[0].numel, TILE):
            count = min(TILE, entries[0].numel - first)
            if len(members) == 1 and members[0][1] == 1:
                yield self._copied(item, members[0][0], first, count)
                continue
            merged = self._merged(item.source, members, first, count)
            yield self._out[: count * item.dtype.itemsize].view(item.dtype).copy_(merged)

    def _read(self, entry: Entry, first: int, count: int) -> Tensor:
        if entry.file not in self._files:
            self._files[entry.file] = entry.file.open("rb", buffering=0)
        out = self._raw[: count * entry.dtype.itemsize].view(entry.dtype)
        read_range(self._files[entry.file], entry, first, out)
        return out

    def _merged(self, tensor: SoupTensor, members: list[tuple[int, float]], first: int, count: int) -> Tensor:
        """Return the float64 sum of weight times value, in the order of the checkpoints."""
        total, part = self._total[:count].zero_(), self._part[:count]
        for k, weight in members:
            total.add_(part.copy_(self._read(tensor.entries[k], first, count)), alpha=weight)
        if not torch.isfinite(total.sum()):
            for k, _ in members:
                self._require_finite(tensor, k, self._read(tensor.entries[k], first, count))
        return total

    def _copied(self, item: PlannedTensor, k: int, first: int, count: int) -> Tensor:
        value = self._read(item.source.entries[k], first, count).to(item.dtype)
        if item.must_be_equal:
            value = value.clone()  # the buffer is read into again
            self._require_equal(item.source, value, first)
        elif item.source.is_float and not torch.isfinite(value.sum()):
            self._require_finite(item.source, k, value)
        return value

    def _require_equal(self, tensor: SoupTensor, value: Tensor, first: int) -> None:
        for label, entry in zip(self.labels, tensor.entries, strict=True):
            if not torch.equal(self._read(entry, first, value.numel()).to(value.dtype), value):
                raise UserError(f"integer tensor {tensor.name!r} differs in {label}: integers have no average")

    def _require_finite(self, tensor: SoupTensor, k: int, value: Tensor) -> None:
        if not torch.isfinite(value).all():
            raise UserError(
                f"{self.labels[k]}: tensor {tensor.name!r} holds NaN or infinity; leave this checkpoint out"
            )


@contextlib.contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[int], None]]:
    if not progress:
        yield lambda nbytes: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", delay=2, disable=None) as bar:
        yield bar.update
