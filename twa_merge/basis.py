"""Centre and deltas of N checkpoints, and the two products that learning needs: `combine` and `project`.

Paper: arXiv 2205.13104, eq. 3 (centre), eq. 4 (normalised deltas), eq. 6 (projection), sec. 4.3 (by layer).

Here a group's shares `a_N` are the coordinates without the normalisation of eq. 4: the merged group is
`theta = m + sum_k a_k d_k`. The paper's coefficients are `c_k = a_k * ||d_k||`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twa_merge.errors import UserError
from twa_merge.groups import Groups
from twa_merge.storage import TILE, Block, block_maker
from twa_merge.tensorfile import RangeReader

if TYPE_CHECKING:
    from twa_merge.checkpoints import Soup

_AT_ONCE = 1 << 22
"""Elements of all checkpoints together that are in memory as floats while a basis is built."""
_NOISE = 1e-6
"""A delta below this share of the centre is float32 rounding, not a direction."""


@dataclass
class Basis:
    """Centre and deltas of every float parameter."""

    blocks: dict[str, Block]
    """Parameter name -> its centre and deltas."""
    groups: Groups
    """All groups, in the order of the mixing weights' rows."""
    norms: Tensor
    """(G, N) float64: `||d_k||` of each group; 0 where a checkpoint does not differ from the centre."""
    centre_norm: float
    """`||m||` of all parameters."""
    storage: str = "float32"

    def __post_init__(self) -> None:
        self._row_of = {name: row for row, names in enumerate(self.groups.values()) for name in names}

    @property
    def num_checkpoints(self) -> int:
        return self.norms.shape[1]

    @property
    def trainable_G(self) -> Tensor:
        """(G,) bool: groups in which any checkpoint differs; the others are copied."""
        return (self.norms > 0).any(dim=1)

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks.values())

    def row_of(self, name: str) -> int:
        return self._row_of[name]

    def combine(self, name: str, shares_N: Tensor, out: Tensor) -> None:
        """Write `m + sum_k a_k d_k` of one parameter into `out`, of the parameter's shape and any float dtype.

        Shares that are mixing weights (sum one) give `sum_k w_k theta_k`, for the deltas sum to zero.
        """
        self.blocks[name].combine(shares_N, out)

    def project(self, name: str, grad: Tensor) -> Tensor:
        """Return the (N,) gradient of the shares, `<grad, d_k>`, from the parameter's own gradient (eq. 6)."""
        return self.blocks[name].project(grad)

    def to(self, device: torch.device | str) -> None:
        """Move the blocks to a device."""
        for block in self.blocks.values():
            block.to(device)

    def shares_to_weights(self, shares_GN: Tensor) -> Tensor:
        """Return the (G, N) mixing weights of shares: `w_k = a_k + (1 - sum(a)) / N`."""
        shares_GN = shares_GN.double()
        return shares_GN + (1 - shares_GN.sum(dim=1, keepdim=True)) / self.num_checkpoints


def build_basis(
    soup: Soup, module: nn.Module, groups: Groups, *, storage: str = "float32", progress: bool = False
) -> Basis:
    """Read every checkpoint once, a few elements of all checkpoints at a time, into centre and deltas.

    Args:
        soup: the checkpoints.
        module: gives names and shapes of the parameters; its values are not read.
        groups: a partition of the names in `mergeable_parameters(soup, module)`.
        storage: `float32`, `bfloat16`, `int8` or `int4`.

    Raises:
        UserError: a tensor holds NaN or infinity (checkpoint and tensor named), or has not the module's shape.
    """
    parameters = mergeable_parameters(soup, module)
    row_of = {name: row for row, names in enumerate(groups.values()) for name in names}
    squares = torch.zeros(len(groups), len(soup) + 1, dtype=torch.float64)
    make = block_maker(storage, len(soup), sum(p.numel() for p in parameters.values()))
    blocks = {}
    with RangeReader() as reader:
        for name, parameter in _with_bar(parameters, progress):
            blocks[name] = make(parameter.numel())
            squares[row_of[name]] += _fill(blocks[name], soup, name, parameter, reader)
    norms, centre_norms = squares[:, :-1].sqrt(), squares[:, -1].sqrt()
    norms[norms <= _NOISE * centre_norms.unsqueeze(1)] = 0
    return Basis(blocks, groups, norms, float(centre_norms.square().sum().sqrt()), storage)


def mergeable_parameters(soup: Soup, module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's float parameters by name, tied ones once.

    Raises:
        UserError: no checkpoint holds a parameter of the module, or a tensor is left over.
    """
    found = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    for name in found:
        if soup.tensor_of(name) is None:
            raise UserError(
                f"{soup.labels[0]}: holds no tensor for the module's parameter {name!r} "
                f"(it has {', '.join(t.name for t in soup.tensors[:3])}, ...); is this the right module?"
            )
    if soup.name_map is None:
        known = set(module.state_dict())
        left = [tensor.name for tensor in soup.tensors if tensor.is_float and tensor.name not in known]
        if left:
            raise UserError(
                f"{soup.labels[0]}: holds {left[0]!r}, which the module does not have; is this the right module?"
            )
    return found


def _fill(block: Block, soup: Soup, name: str, parameter: nn.Parameter, reader: RangeReader) -> Tensor:
    """Put a parameter's centre and deltas into its block; return the (N + 1,) squares of their norms."""
    tensor = soup.tensor_of(name)
    assert tensor is not None
    for label, entry in zip(soup.labels, tensor.entries, strict=True):
        if entry.shape != tuple(parameter.shape):
            raise UserError(f"{label}: {name!r} has shape {list(entry.shape)}, the module {list(parameter.shape)}")
    squares = torch.zeros(len(soup) + 1, dtype=torch.float64)
    size = max(1, _AT_ONCE // (len(soup) * TILE)) * TILE
    for first in range(0, parameter.numel(), size):
        values = torch.empty(len(soup), min(size, parameter.numel() - first), dtype=torch.float64)
        for k, entry in enumerate(tensor.entries):
            values[k] = reader.read(entry, first, values.shape[1])
            if not torch.isfinite(values[k].sum()) and not torch.isfinite(values[k]).all():
                raise UserError(f"{soup.labels[k]}: tensor {name!r} holds NaN or infinity; leave this checkpoint out")
        centre = values.mean(dim=0)
        values -= centre
        deltas = values.float()
        block.put(first, deltas, centre.float())
        squares[:-1] += deltas.double().square().sum(dim=1)
        squares[-1] += centre.float().double().square().sum()
    return squares


def _with_bar(parameters: Mapping[str, nn.Parameter], progress: bool) -> Iterable[tuple[str, nn.Parameter]]:
    if not progress:
        return parameters.items()
    from tqdm import tqdm

    bar: Iterable[tuple[str, nn.Parameter]] = tqdm(
        parameters.items(), desc="reading", unit="tensor", delay=2, disable=None
    )
    return bar
