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

if TYPE_CHECKING:
    from twa_merge.checkpoints import Soup

_TILE = 1 << 18
_NOISE = 1e-6
"""A delta below this share of the centre is float32 rounding, not a direction."""


@dataclass
class Basis:
    """Centre and deltas of every float parameter, in float32.

    A parameter's `N + 1` rows lie in one block, deltas first and the centre last, so that `combine` is one
    matrix-vector product, read once.
    """

    blocks: dict[str, Tensor]
    """Parameter name -> (N + 1, D_t) float32."""
    groups: Groups
    """All groups, in the order of the mixing weights' rows."""
    norms: Tensor
    """(G, N) float64: `||d_k||` of each group; 0 where a checkpoint does not differ from the centre."""

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
        block = self.blocks[name]
        row = torch.ones(len(block), dtype=block.dtype, device=block.device)
        row[:-1] = shares_N
        if out.dtype == block.dtype and out.is_contiguous():
            torch.matmul(row.unsqueeze(0), block, out=out.view(1, -1))
        else:
            out.copy_(torch.matmul(row, block).view(out.shape))

    def project(self, name: str, grad: Tensor) -> Tensor:
        """Return the (N,) gradient of the shares, `<grad, d_k>`, from the parameter's own gradient (eq. 6)."""
        block = self.blocks[name]
        return torch.mv(block, grad.reshape(-1).to(block.dtype))[:-1]

    def to(self, device: torch.device | str) -> None:
        """Move the blocks to a device."""
        self.blocks = {name: block.to(device) for name, block in self.blocks.items()}

    def shares_to_weights(self, shares_GN: Tensor) -> Tensor:
        """Return the (G, N) mixing weights of shares: `w_k = a_k + (1 - sum(a)) / N`."""
        shares_GN = shares_GN.double()
        return shares_GN + (1 - shares_GN.sum(dim=1, keepdim=True)) / self.num_checkpoints


def build_basis(soup: Soup, module: nn.Module, groups: Groups, *, progress: bool = False) -> Basis:
    """Read every checkpoint once, tensor by tensor, into centre and deltas.

    Args:
        soup: the checkpoints.
        module: gives names and shapes of the parameters; its values are not read.
        groups: a partition of the names in `mergeable_parameters(soup, module)`.

    Raises:
        UserError: a tensor holds NaN or infinity (checkpoint and tensor named), or has not the module's shape.
    """
    parameters = mergeable_parameters(soup, module)
    row_of = {name: row for row, names in enumerate(groups.values()) for name in names}
    squares = torch.zeros(len(groups), len(soup), dtype=torch.float64)
    centre_squares = torch.zeros(len(groups), dtype=torch.float64)
    blocks = {}
    for name, parameter in _with_bar(parameters, progress):
        block = _centred_block(soup, name, parameter)
        blocks[name] = block
        sums = _row_squares(block)
        squares[row_of[name]] += sums[:-1]
        centre_squares[row_of[name]] += sums[-1]
    norms = squares.sqrt()
    norms[norms <= _NOISE * centre_squares.sqrt().unsqueeze(1)] = 0
    return Basis(blocks, groups, norms)


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


def _centred_block(soup: Soup, name: str, parameter: nn.Parameter) -> Tensor:
    block = torch.empty(len(soup) + 1, parameter.numel(), dtype=torch.float32)
    for k in range(len(soup)):
        value = soup.read(k, name)
        if value.shape != parameter.shape:
            raise UserError(
                f"{soup.labels[k]}: {name!r} has shape {list(value.shape)}, the module {list(parameter.shape)}"
            )
        if not torch.isfinite(value.float().sum()) and not torch.isfinite(value).all():
            raise UserError(f"{soup.labels[k]}: tensor {name!r} holds NaN or infinity; leave this checkpoint out")
        block[k] = value.view(-1)
    for first in range(0, parameter.numel(), _TILE):
        tile = block[:-1, first : first + _TILE].double()
        centre = tile.mean(dim=0)
        block[-1, first : first + _TILE] = centre
        block[:-1, first : first + _TILE] = tile - centre
    return block


def _row_squares(block: Tensor) -> Tensor:
    total = torch.zeros(len(block), dtype=torch.float64)
    for first in range(0, block.shape[1], _TILE):
        total += block[:, first : first + _TILE].double().square().sum(dim=1)
    return total


def _with_bar(parameters: Mapping[str, nn.Parameter], progress: bool) -> Iterable[tuple[str, nn.Parameter]]:
    if not progress:
        return parameters.items()
    from tqdm import tqdm

    bar: Iterable[tuple[str, nn.Parameter]] = tqdm(
        parameters.items(), desc="reading", unit="tensor", delay=2, disable=None
    )
    return bar
