"""`Soup`: N checkpoints whose tensors are known to fit together, read from headers before any data."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from twa_merge.alignment import Header, SoupTensor, align, joined, same_data, untied
from twa_merge.configs import compare_configs
from twa_merge.errors import UserError
from twa_merge.names import NameMap, map_names, meta_module
from twa_merge.preparation import compare_processors, compare_tokenizers
from twa_merge.sources import Source, find_sources
from twa_merge.tensorfile import read_head, read_header, read_tensor

COEFFICIENTS_KEY = "twa_coefficients"
"""The one tensor in a training checkpoint of a `MergedModel`; such a folder is not a model."""


class Soup:
    """N checkpoints of one architecture.

    Creating one reads headers and configs only and checks that every tensor is in every checkpoint with one shape,
    and that the configs mean the same function.

    Args:
        checkpoints: folders, globs, safetensors files or Hub ids; the first gives config, names and tokenizer.
        allow_pickle: also read `pytorch_model.bin`, with `weights_only=True`.

    Raises:
        UserError: the checkpoints cannot be merged; the message names checkpoint, tensor or key, and both values.
    """

    def __init__(self, checkpoints: str | Path | Sequence[str | Path | Source], *, allow_pickle: bool = False) -> None:
        self.sources = find_sources(checkpoints, allow_pickle=allow_pickle)
        if not self.sources:
            raise UserError("no checkpoint given")
        self._unpickled: list[tempfile.TemporaryDirectory[str]] = []
        headers = [self._header(source) for source in self.sources]
        self.notes = _compare_folders(self.sources)
        """Harmless differences between the checkpoints, a line each."""
        self.tensors = align(headers, self.labels, [source.folder for source in self.sources])

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(source.label for source in self.sources)

    @property
    def revisions(self) -> tuple[str, ...]:
        """The commit of each checkpoint from the Hub; empty for the others."""
        return tuple(source.revision or "" for source in self.sources)

    @property
    def folder(self) -> Path | None:
        """The first checkpoint's folder: config, names and tokenizer come from here."""
        return self.sources[0].folder

    def __len__(self) -> int:
        return len(self.sources)

    @cached_property
    def name_map(self) -> NameMap | None:
        """Names on disk -> names in the module, for the first checkpoint.

        None where there is no config, or one of a class that transformers does not have: a module given in Python
        then has the names on disk, or `mergeable_parameters` says which it lacks.
        """
        if self.folder is None or not _has_known_class(self.folder):
            return None
        return map_names(meta_module(self.folder), [tensor.name for tensor in self.tensors])

    @cached_property
    def _by_parameter(self) -> dict[str, SoupTensor]:
        if self.name_map is None:
            return {tensor.name: tensor for tensor in self.tensors}
        found: dict[str, SoupTensor] = {}
        parts: dict[str, dict[tuple[int, int], SoupTensor]] = {}
        for tensor in self.tensors:
            mapped = self.name_map.mapped.get(tensor.name)
            if mapped is None:
                continue
            if mapped.part is not None:
                if mapped.place is None or len(mapped.parameters) != 1:
                    raise UserError(
                        f"{self.labels[0]}: {mapped.parameters[0]!r} is computed from several tensors on load; "
                        "learning on such models is not supported yet, `average` and `apply` are"
                    )
                parts.setdefault(mapped.parameters[0], {})[mapped.place] = tensor
                continue
            twin = found.setdefault(mapped.parameters[0], tensor)
            for label, a, b in zip(self.labels, twin.entries, tensor.entries, strict=True):
                if a is not b and not same_data(a, b):
                    raise UserError(untied(label, tensor.name))
        for name, placed in parts.items():
            found[name] = joined(name, [placed[place] for place in sorted(placed)], self.name_map.shapes[name])
        return found

    def parameters_of(self, name: str) -> tuple[str, ...]:
        """Return the module's names of the tensor `name` on disk; empty if the module does not use it."""
        if self.name_map is None:
            return (name,)
        mapped = self.name_map.mapped.get(name)
        return () if mapped is None else mapped.parameters

    def canonical(self, name: str) -> str:
        """Return the name under which a tied parameter of the module is kept here."""
        return self.name_map.ties.get(name, name) if self.name_map is not None else name

    def tensor_of(self, parameter: str) -> SoupTensor | None:
        """Return where the module's parameter or buffer is kept, or None if no checkpoint holds it."""
        return self._by_parameter.get(self.canonical(parameter))

    def read(self, checkpoint: int, parameter: str) -> Tensor:
        """Return checkpoint `checkpoint`'s value of the module's parameter or buffer, in its dtype on disk."""
        tensor = self.tensor_of(parameter)
        if tensor is None:
            raise KeyError(parameter)
        return read_tensor(tensor.entries[checkpoint])

    @cached_property
    def fingerprints(self) -> tuple[str, ...]:
        """A hash of each checkpoint's names, shapes, dtypes and the first KiB of every tensor, however sharded."""
        return tuple(self._fingerprint(k) for k in range(len(self)))

    def _fingerprint(self, checkpoint: int) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for tensor in sorted(self.tensors, key=lambda tensor: tensor.name):
            entry = tensor.entries[checkpoint]
            digest.update(f"{tensor.name} {entry.dtype} {entry.shape}".encode())
            head = read_head(entry, min(entry.numel, 1024 // entry.dtype.itemsize))
            digest.update(head.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _header(self, source: Source) -> Header:
        header: Header = dict(source.header or {})
        for file in source.files:
            file = file if file.suffix == ".safetensors" else self._unpickle(file)
            for name, entry in read_header(file).items():
                if name in header:
                    raise UserError(f"{source.label}: tensor {name!r} is in two shards; save the checkpoint again")
                header[name] = entry
        if COEFFICIENTS_KEY in header:
            raise UserError(
                f"{source.label}: holds the coefficients of a merge in training, not a model; "
                "give the checkpoints that it merges"
            )
        if not header:
            raise UserError(f"{source.label}: holds no tensor")
        return header

    def _unpickle(self, file: Path) -> Path:
        """Convert a pickle that the user trusts into a temporary safetensors file, so that one reader serves all."""
        from safetensors.torch import save_file

        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises pickle, zip and runtime errors alike
            raise UserError(f"{file}: not a readable weights-only pickle ({type(error).__name__})") from error
        state = state.get("state_dict", state)
        state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self._unpickled.append(tempfile.TemporaryDirectory(prefix="twa_merge-"))
        target = Path(self._unpickled[-1].name) / "model.safetensors"
        save_file({name: value.clone().contiguous() for name, value in state.items()}, target)
        return target


def _has_known_class(folder: Path) -> bool:
    import transformers

    if not (folder / "config.json").is_file():
        return False
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    return hasattr(transformers, str(names[0]))


def _compare_folders(sources: Sequence[Source]) -> list[str]:
    with_config = [s for s in sources if s.folder is not None and (s.folder / "config.json").is_file()]
    if not with_config:
        return []
    for source in sources:
        if source not in with_config:
            raise UserError(
                f"{source.label}: no config.json, but {with_config[0].label} has one; are both checkpoints?"
            )
    notes = []
    first = sources[0].folder
    for source in sources[1:]:
        assert first is not None and source.folder is not None
        differences = [
            line
            for compare in (compare_configs, compare_tokenizers, compare_processors)
            for line in compare(first, source.folder)
        ]
        notes += [f"{source.label}: {line}" for line in differences]
    return notes


def require_several(labels: Iterable[str]) -> None:
    """Raise unless there are at least two checkpoints to merge."""
    labels = list(labels)
    if len(labels) < 2:
        raise UserError(f"a merge needs at least two checkpoints, got {len(labels)} ({', '.join(labels) or 'none'})")
