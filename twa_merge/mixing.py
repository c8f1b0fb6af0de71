"""`MixingWeights`: a merge as a table, and the fixed schemes that need no training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from twa_merge.errors import UserError
from twa_merge.groups import Groups

FORMAT = "twa_merge.mixing_weights.v1"
_METADATA = "twa_merge"
_TABLE = "mixing_weights"
_STATISTICS = "statistics."


@dataclass(frozen=True)
class MixingWeights:
    """A merge: group g of the merged model is `sum_k table[g, k] * theta_k[g]`.

    Every row sums to one. `learn` and the baselines only differ in how they fill the table.
    """

    table: Tensor
    """(G, N) float64."""
    groups: Groups
    """G groups, in the order of the rows. A table with one row applies to every tensor, whatever its name."""
    checkpoints: tuple[str, ...]
    """N labels, in the order of the columns."""
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """Buffers that replace merged ones, by name in the module: BatchNorm's recomputed running statistics, averages."""
    fingerprints: tuple[str, ...] = ()
    """N hashes of the checkpoints that the table was made for, where known; `apply` checks them."""
    revisions: tuple[str, ...] = ()
    """N commits, of checkpoints from the Hub; empty for the others."""
    linear: bool = False
    """Rows may sum to anything: the linear span of the checkpoints (eq. 1)."""

    def __post_init__(self) -> None:
        expected = (len(self.groups), len(self.checkpoints))
        if self.table.dtype != torch.float64 or tuple(self.table.shape) != expected:
            raise ValueError(f"table: expected float64 of shape {expected}, got {self.table.dtype} {self.table.shape}")
        if not self.groups:
            raise ValueError("groups: expected at least one")
        if len(self.fingerprints) not in (0, len(self.checkpoints)):
            raise ValueError(f"fingerprints: expected {len(self.checkpoints)}, got {len(self.fingerprints)}")
        names = [name for members in self.groups.values() for name in members]
        if len(names) != len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"groups: {twice!r} is in two of them")
        sums = self.table.sum(dim=1)
        # the negation also catches NaN
        wrong = ~torch.isfinite(sums) if self.linear else ~((sums - 1).abs() <= 1e-6)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise UserError(
                f"mixing weights of group {list(self.groups)[row]!r} sum to {float(sums[row]):g}, expected 1: "
                "scale the weights so that they do"
            )

    @property
    def mean_N(self) -> Tensor:
        """(N,) the mean over groups, scaled to sum to one: what is in no group is averaged so."""
        mean = self.table.mean(dim=0)
        return mean / mean.sum() if self.linear else mean

    @property
    def num_checkpoints(self) -> int:
        return len(self.checkpoints)

    def row(self, name: str) -> Tensor:
        """Return the (N,) mixing weights of the parameter `name`.

        Raises:
            UserError: no group holds it.
        """
        if not self.knows(name):
            raise UserError(f"mixing weights: no row for the parameter {name!r}; are they of another model?")
        return self.table[0 if len(self.groups) == 1 else self._row_of()[name]]

    def knows(self, name: str) -> bool:
        """Whether `row(name)` has an answer."""
        return len(self.groups) == 1 or name in self._row_of()

    def _row_of(self) -> dict[str, int]:
        cached = self.__dict__.get("_rows")
        if cached is None:
            cached = {name: row for row, names in enumerate(self.groups.values()) for name in names}
            object.__setattr__(self, "_rows", cached)
        return cached

    def one_hot_column(self) -> int | None:
        """Return the checkpoint that this merge simply is, or None."""
        column = int(self.table[0].argmax())
        same = torch.zeros_like(self.table)
        same[:, column] = 1
        return column if torch.equal(self.table, same) else None

    def is_convex(self) -> bool:
        """Whether no weight is negative."""
        return bool((self.table >= 0).all())

    def save(self, folder: Path) -> None:
        """Write `mixing_weights.safetensors` (exact) and `mixing_weights.json` (readable) into `folder`."""
        from safetensors.torch import save_file

        tensors = {_TABLE: self.table.contiguous()}
        tensors |= {_STATISTICS + name: value.contiguous() for name, value in self.statistics.items()}
        about = {
            "format": FORMAT,
            "checkpoints": list(self.checkpoints),
            "fingerprints": list(self.fingerprints),
            "revisions": list(self.revisions),
            "linear": self.linear,
            "groups": {g: list(names) for g, names in self.groups.items()},
        }
        metadata = {_METADATA: json.dumps(about)}  # one key: the library writes several in any order
        save_file(tensors, folder / "mixing_weights.safetensors", metadata=metadata)
        readable = {
            "format": FORMAT,
            "checkpoints": list(self.checkpoints),
            "mixing_weights": dict(zip(self.groups, self.table.tolist(), strict=True)),
            "recomputed_statistics": sorted(self.statistics),
        }
        (folder / "mixing_weights.json").write_text(json.dumps(readable, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> MixingWeights:
        """Read a table from `mixing_weights.safetensors`, or from a folder that holds one.

        Raises:
            UserError: not such a file.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        path = path / "mixing_weights.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"{path}: no such mixing weights; give a merged folder or its mixing_weights.safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from error
        try:
            about = json.loads(metadata.get(_METADATA, "{}"))
            if about.get("format") != FORMAT:
                raise ValueError("no mixing weights of twa_merge")
            return cls(
                table=tensors.pop(_TABLE),
                groups={str(group): tuple(map(str, names)) for group, names in about["groups"].items()},
                checkpoints=tuple(map(str, about["checkpoints"])),
                statistics={name.removeprefix(_STATISTICS): value for name, value in tensors.items()},
                fingerprints=tuple(map(str, about["fingerprints"])),
                revisions=tuple(map(str, about.get("revisions", ()))),
                linear=bool(about.get("linear", False)),
            )
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: holds no mixing weights of twa_merge ({error}); expected a file that `train` left behind"
            ) from error


def one_row(
    weights: Sequence[float] | Tensor, checkpoints: Sequence[str], groups: Groups | None = None
) -> MixingWeights:
    """Return the merge that gives every group the same N weights, which must sum to one."""
    groups = groups or {"model": ()}
    row = torch.as_tensor(weights, dtype=torch.float64)
    if len(row) != len(checkpoints):
        raise UserError(f"weights: expected {len(checkpoints)}, one for each checkpoint, got {len(row)}")
    return MixingWeights(row.repeat(len(groups), 1), groups, tuple(checkpoints))


def given(weights: Sequence[float], checkpoints: Sequence[str]) -> MixingWeights:
    """Return the merge with the user's weights, scaled to sum to one.

    Raises:
        UserError: a weight that is not finite, or weights that sum to zero.
    """
    row = torch.tensor(weights, dtype=torch.float64)
    if not torch.isfinite(row).all():
        raise UserError(f"weights: expected finite numbers, got {', '.join(f'{w:g}' for w in weights)}")
    total = float(row.sum())
    if not math.isfinite(total):
        raise UserError(f"weights: {', '.join(f'{w:g}' for w in weights)} are too large to be summed")
    if abs(total) < 1e-12 * float(row.abs().sum()) or total == 0:
        raise UserError(f"weights: {', '.join(f'{w:g}' for w in weights)} sum to zero and cannot be scaled to one")
    return one_row(row / total, checkpoints)


def uniform(checkpoints: Sequence[str], groups: Groups | None = None) -> MixingWeights:
    """Return the uniform soup: every weight 1/N (SWA, Izmailov et al. 2018; uniform soup, Wortsman et al. 2022)."""
    return one_row([1 / len(checkpoints)] * len(checkpoints), checkpoints, groups)


def one_hot(index: int, checkpoints: Sequence[str], groups: Groups | None = None) -> MixingWeights:
    """Return the merge that is checkpoint `index` itself."""
    return subset([index], checkpoints, groups)


def subset(indices: Sequence[int], checkpoints: Sequence[str], groups: Groups | None = None) -> MixingWeights:
    """Return the uniform average of the checkpoints `indices`."""
    row = torch.zeros(len(checkpoints), dtype=torch.float64)
    row[list(indices)] = 1 / len(indices)
    return one_row(row, checkpoints, groups)


def last_k(k: int, checkpoints: Sequence[str], groups: Groups | None = None) -> MixingWeights:
    """Return the uniform average of the last `k` snapshots (LAWA, Kaddour 2022)."""
    if not 1 <= k <= len(checkpoints):
        raise UserError(f"last-k: expected k from 1 to {len(checkpoints)} checkpoints, got {k}")
    return subset(range(len(checkpoints) - k, len(checkpoints)), checkpoints, groups)


def ema(decay: float, checkpoints: Sequence[str], groups: Groups | None = None) -> MixingWeights:
    """Return the exponential moving average over the snapshots in order, started at the first.

    `theta <- decay * theta + (1 - decay) * theta_k`, so the first snapshot weighs `decay**(N-1)`.
    """
    if not 0 <= decay < 1:
        raise UserError(f"ema: expected a decay from 0 up to but not including 1, got {decay}")
    row = torch.zeros(len(checkpoints), dtype=torch.float64)
    row[0] = 1
    for index in range(1, len(checkpoints)):
        row *= decay
        row[index] = 1 - decay
    return one_row(row, checkpoints, groups)
