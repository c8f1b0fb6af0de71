"""Random directions around the checkpoints' centre (Li et al. 2018, intrinsic dimension), to compare with theirs.

They are made anew from a seed whenever they are needed, and never stored.

Legend: R directions, D_t elements of a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from twa_merge.basis import Basis, build_basis
from twa_merge.checkpoints import Soup
from twa_merge.groups import Groups

_TILE = 1 << 16
"""Elements of all directions together that are made at a time."""


class RandomBlock:
    """R random directions of one parameter, less their mean, so that equal weights give the centre."""

    holds_sums = False

    def __init__(self, num_directions: int, centre: Tensor, scale: float, seed: int) -> None:
        self.num_directions, self.scale, self.seed = num_directions, scale, seed
        self.centre_D = centre.reshape(-1).float()

    @property
    def nbytes(self) -> int:
        return self.centre_D.nbytes

    def put(self, first: int, deltas: Tensor, centre: Tensor) -> None:
        """Do nothing: there are no checkpoints."""

    def to(self, device: torch.device | str) -> None:
        self.centre_D = self.centre_D.to(device)

    def centre(self) -> Tensor:
        return self.centre_D

    def combine(self, weights_N: Tensor, out: Tensor) -> None:
        row = (weights_N - weights_N.mean()).to(self.centre_D)
        total = self.centre_D.clone()
        for where, values in self._tiles():
            total[where] += row @ values
        out.copy_(total.view(out.shape))

    def project(self, grad: Tensor) -> Tensor:
        flat = grad.reshape(-1).float()
        total = torch.zeros(self.num_directions, device=flat.device)
        for where, values in self._tiles():
            total += values @ flat[where]
        return total - total.mean()

    def squares(self) -> Tensor:
        """Return the (R,) float64 squares of the directions' norms."""
        total = torch.zeros(self.num_directions, dtype=torch.float64)
        for _, values in self._tiles():
            total += (values - values.mean(dim=0)).double().square().sum(dim=1).cpu()
        return total

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        step = max(1, _TILE // self.num_directions)
        for first in range(0, len(self.centre_D), step):
            where = slice(first, min(first + step, len(self.centre_D)))
            shape = (self.num_directions, where.stop - first)
            yield where, self.scale * torch.randn(shape, generator=generator).to(self.centre_D.device)


def random_basis(soup: Soup, module: nn.Module, groups: Groups, *, dimensions: int, seed: int = 0) -> Basis:
    """Return a basis of random directions around the soup's centre, each as long as the checkpoints' deltas are.

    `MergedModel(module, random_basis(...), labels)`, with R names of your own, learns on it as on any other;
    `merge_and_unload` gives the result.
    Its mixing weights are of no checkpoints, and cannot be written.

    Args:
        soup: gives the centre and, of each group, the root mean square of the deltas' norms.
        module: gives names and shapes of the parameters.
        groups: a partition of their names.
        dimensions: R - 1: the directions sum to zero.
        seed: of the directions.
    """
    around = build_basis(soup, module, groups, storage="disk")
    blocks: dict[str, RandomBlock] = {}
    norms = torch.zeros(len(groups), dimensions + 1, dtype=torch.float64)
    for row, names in enumerate(groups.values()):
        numel = sum(around.blocks[name].centre().numel() for name in names)
        # taking out their mean leaves (R - 1) / R of the squared lengths of R directions
        scale = float(around.norms[row].square().mean().sqrt()) / (max(1, numel) * dimensions / (dimensions + 1)) ** 0.5
        for name in names:
            block = RandomBlock(dimensions + 1, around.blocks[name].centre(), scale, seed * 1_000_003 + len(blocks))
            blocks[name] = block
            norms[row] += block.squares()
    return Basis(dict(blocks), groups, norms.sqrt(), around.centre_norms)
