"""Every tensor of a merge, worked out and checked from headers alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twa_merge.alignment import SoupTensor, same_data
from twa_merge.checkpoints import Soup
from twa_merge.errors import UserError
from twa_merge.mixing import MixingWeights

_COUNTER = "num_batches_tracked"
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


def require_equal_integers(soup: Soup) -> None:
    """Raise if checkpoints differ in a tensor of whole numbers, BatchNorm's counters apart: they have no average."""
    for tensor in soup.tensors:
        if tensor.is_float or tensor.name.endswith(_COUNTER):
            continue
        first = soup.read(0, tensor.name)
        for k, label in enumerate(soup.labels):
            if not torch.equal(soup.read(k, tensor.name), first):
                raise UserError(f"integer tensor {tensor.name!r} differs in {label}: integers have no average")


def _require_same_checkpoints(soup: Soup, weights: MixingWeights) -> None:
    if weights.num_checkpoints != len(soup):
        raise UserError(
            f"the mixing weights are for {weights.num_checkpoints} checkpoints ({', '.join(weights.checkpoints)}), "
            f"got {len(soup)}"
        )
    if not weights.fingerprints:
        _require_same_names(soup, weights)
    for k, expected in enumerate(weights.fingerprints):
        if soup.fingerprints[k] == expected:
            continue
        hint = "give the checkpoints that the table was made for, in their order"
        if expected in soup.fingerprints:
            hint = f"it is {soup.labels[soup.fingerprints.index(expected)]}: the order differs"
        raise UserError(f"{soup.labels[k]}: is not checkpoint {k + 1} of the table ({weights.checkpoints[k]}); {hint}")


def _require_same_names(soup: Soup, weights: MixingWeights) -> None:
    """Check what can be checked of a table that does not know its checkpoints' contents."""
    if weights.checkpoints != soup.labels and sorted(weights.checkpoints) == sorted(soup.labels):
        raise UserError(
            f"the mixing weights are for {', '.join(weights.checkpoints)}, got {', '.join(soup.labels)}: give the "
            "checkpoints in the table's order"
        )
    named = {name for names in weights.groups.values() for name in names} | set(weights.statistics)
    if not named:
        return
    here = {name for tensor in soup.tensors for name in soup.parameters_of(tensor.name)}
    strange = next((name for name in sorted(named) if soup.canonical(name) not in here), None)
    if strange is not None:
        raise UserError(f"the mixing weights name {strange!r}, which {soup.labels[0]} does not hold; of another model?")


def _row_of_twin(soup: Soup, tensor: SoupTensor, weights: MixingWeights) -> list[Tensor]:
    """Return the row of the tensor that this one is an alias of, where a module's ties are on disk under both names."""
    for other in soup.tensors:
        name = next((n for n in soup.parameters_of(other.name) if weights.knows(n)), None)
        if name is None or other.entries[0].shape != tensor.entries[0].shape:
            continue
        if all(same_data(a, b) for a, b in zip(tensor.entries, other.entries, strict=True)):
            return [weights.row(name)]
    return []


def _plan_tensor(
    soup: Soup, tensor: SoupTensor, weights: MixingWeights, lead: int, dtype: torch.dtype | None
) -> PlannedTensor:
    own = tensor.entries[lead].dtype
    if not tensor.is_float:
        chosen = torch.zeros(len(soup), dtype=torch.float64)
        chosen[lead] = 1
        return PlannedTensor(tensor, own, chosen, None, must_be_equal=not tensor.name.endswith(_COUNTER))
    if not weights.statistics and len(weights.groups) == 1:  # one row fits all: no need to know the module's names
        return PlannedTensor(tensor, dtype or own, weights.table[0], None, must_be_equal=False)
    names = soup.parameters_of(tensor.name)
    value = next((weights.statistics[name] for name in names if name in weights.statistics), None)
    rows = [weights.row(name) for name in names if weights.knows(name)]
    if not rows and value is None:
        rows = _row_of_twin(soup, tensor, weights)
    if not rows:  # a buffer, or a tensor that the model does not use
        if soup.name_map is not None and any(name in soup.name_map.parameters for name in names):
            raise UserError(
                f"the mixing weights have no row for the parameter {names[0]!r}; are they of another model?"
            )
        rows = [weights.mean_N]
    if any(not torch.equal(row, rows[0]) for row in rows[1:]):
        raise UserError(
            f"tensor {tensor.name!r} holds {', '.join(names)}, whose mixing weights differ; cannot be split"
        )
    if value is not None and tuple(value.shape) != tensor.entries[0].shape:
        raise UserError(f"statistic {tensor.name!r}: the mixing weights hold shape {list(value.shape)}; another model?")
    return PlannedTensor(tensor, dtype or own, rows[0], value, must_be_equal=False)
