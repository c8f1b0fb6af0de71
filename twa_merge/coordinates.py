"""What trains: R coefficients of a group, and the small matrix that makes its N mixing weights of them.

Every basis of a group's deltas (paper, eq. 4; orthogonal; principal components; with the centre, eq. 1) is the deltas
themselves times a matrix of R x N numbers. It is computed from their N x N Gram matrix: nothing of size D is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from twa_merge.errors import UserError

DIRECTIONS = ("deltas", "orthogonal", "pca")
COORDINATES = ("relative", "normalized")
_DEPENDENT = 1e-10
"""What is left of a delta's square, or of the largest eigenvalue, and is rounding: twice the digits of a length."""


class HasGram(Protocol):
    """What coordinates need to know of a basis."""

    norms: Tensor
    """(G, N) float64."""
    centre_norms: Tensor
    """(G,) float64."""
    gram: Tensor | None
    """(G, N, N) float64 inner products of the deltas."""


@dataclass(frozen=True)
class Coordinates:
    """How coefficients and mixing weights belong together, for G' groups."""

    matrix: Tensor
    """(G', R, N) float64: `weights = 1 / N + coefficients @ matrix`."""
    inverse: Tensor
    """(G', N, R) float64: `coefficients = (weights - 1 / N) @ inverse`; the nearest, of weights out of reach."""

    def weights(self, coefficients_GR: Tensor) -> Tensor:
        """Return the (G', N) mixing weights."""
        change = torch.einsum("gr,grn->gn", coefficients_GR.double(), self.matrix)
        return change + 1 / self.matrix.shape[2]

    def coefficients(self, weights_GN: Tensor) -> Tensor:
        """Return the (G', R) coefficients."""
        return torch.einsum("gn,gnr->gr", weights_GN - 1 / self.matrix.shape[2], self.inverse)


def needs_gram(directions: str) -> bool:
    """Whether a basis must keep the inner products of its deltas for this.

    Raises:
        UserError: there are no such directions.
    """
    if directions not in DIRECTIONS:
        raise UserError(f"directions: expected {', '.join(DIRECTIONS[:-1])} or {DIRECTIONS[-1]}, got {directions!r}")
    return directions != "deltas"


def coordinates_of(
    basis: HasGram,
    groups: Tensor,
    *,
    coordinates: str = "relative",
    directions: str = "deltas",
    components: int | None = None,
    centre: bool = False,
) -> Coordinates:
    """Return the coordinates of some groups of a basis.

    Args:
        basis: norms and, for `orthogonal` and `pca`, the Gram matrix.
        groups: (G',) their rows.
        coordinates: `relative`: a step of lr moves a group by that share of its deltas (of their root mean square, for
            orthogonal directions). `normalized`: it moves it by lr in L2 distance (eq. 4).
        directions: `deltas`; `orthogonal`, Gram-Schmidt in the order of the checkpoints; `pca`, the principal
            components of the checkpoints, largest first.
        components: of `pca`, how many; default all N - 1.
        centre: one more direction, the centre: the linear span of eq. 1 in place of the affine one.

    Raises:
        UserError: no such coordinates, or more components than there are.
    """
    if coordinates not in COORDINATES:
        raise UserError(f"coordinates: expected {' or '.join(COORDINATES)}, got {coordinates!r}")
    norms_GN = basis.norms[groups]
    n = norms_GN.shape[1]
    if components is not None and (directions != "pca" or not 1 <= components < n):
        raise UserError(
            f"components: expected 1 to {n - 1} for {n} checkpoints, with directions pca; got {components} with "
            f"{directions}"
        )
    relative = coordinates == "relative"
    if needs_gram(directions):
        if basis.gram is None:
            raise UserError(f"directions {directions}: need a basis that was built with its Gram matrix (gram=True)")
        find = orthonormal if directions == "orthogonal" else partial(principal, components=components or n - 1)
        matrix, inverse = _of_gram(basis.gram[groups], find, relative=relative)
    else:
        matrix, inverse = _of_deltas(norms_GN, relative=relative)
    # the deltas sum to zero: equal parts of all of them are nothing
    matrix = matrix - matrix.mean(dim=2, keepdim=True)
    inverse = inverse - inverse.mean(dim=1, keepdim=True)
    if centre:
        centre_norms_G = basis.centre_norms[groups].clamp_min(1e-300)
        scale_G = torch.ones_like(centre_norms_G) if relative else 1 / centre_norms_G
        of_centre = scale_G[:, None, None].expand(-1, 1, n)
        matrix = torch.cat([matrix, of_centre / n], dim=1)
        inverse = torch.cat([inverse, 1 / of_centre.transpose(1, 2)], dim=2)
    return Coordinates(matrix, inverse)


def _of_deltas(norms_GN: Tensor, *, relative: bool) -> tuple[Tensor, Tensor]:
    """Return (G', N, N) matrix and inverse of the deltas, as they are or of length one; zeros for a delta of zeros."""
    unit = torch.ones_like(norms_GN) if relative else norms_GN
    known = norms_GN > 0
    scale = torch.where(known, 1 / unit.clamp_min(1e-300), 0.0)
    return torch.diag_embed(scale), torch.diag_embed(torch.where(known, unit, 0.0))


def _of_gram(gram_GNN: Tensor, find: Callable[[Tensor], Tensor], *, relative: bool) -> tuple[Tensor, Tensor]:
    """Return (G', R, N) matrix and (G', N, R) inverse of orthonormal directions; `find` makes their rows of a Gram."""
    if not len(gram_GNN):
        return gram_GNN, gram_GNN
    matrix = torch.stack([find(gram) for gram in gram_GNN])
    mean_square_G = gram_GNN.diagonal(dim1=1, dim2=2).mean(dim=1)
    length_G11 = (mean_square_G.sqrt() if relative else torch.ones_like(mean_square_G))[:, None, None]
    return matrix * length_G11, gram_GNN @ matrix.transpose(1, 2) / length_G11


def orthonormal(gram_NN: Tensor) -> Tensor:
    """Return (N, N) float64 rows, the coefficients of orthonormal directions of the same span, in the deltas' order.

    Gram-Schmidt, twice over, on N numbers a direction in place of D: products come from the Gram matrix. A delta that
    those before it span has a row of zeros.
    """
    rows = torch.zeros_like(gram_NN)
    for k in range(len(gram_NN)):
        row = torch.zeros_like(rows[k])
        row[k] = 1
        for _ in range(2):
            row = row - (rows @ (gram_NN @ row)) @ rows
        square = row @ gram_NN @ row
        if square > _DEPENDENT * gram_NN[k, k]:
            rows[k] = row / square.sqrt()
    return rows


def principal(gram_NN: Tensor, components: int) -> Tensor:
    """Return (components, N) float64 rows, the coefficients of the largest principal components, of length one.

    Components without variance are rows of zeros.
    """
    values, vectors = torch.linalg.eigh(gram_NN)
    values, vectors = values.flip(0)[:components], vectors.flip(1)[:, :components]
    sign = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    known = values > _DEPENDENT * values[0]
    rows: Tensor = (vectors * sign * torch.where(known, values.clamp_min(1e-300).rsqrt(), 0.0)).T
    return rows
