"""Centre and deltas of N checkpoints, and the two products that learning needs: `combine` and `project`.

Paper: arXiv 2205.13104, eq. 3 (centre), eq. 4 (normalised deltas), eq. 6 (projection), sec. 4.3 (by layer).

Here a group's shares `a_N` are the coordinates without the normalisation of eq. 4: the merged group is
`theta = m + sum_k a_k d_k`. The paper's coefficients are `c_k = a_k * ||d_k||`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twa_merge import sharding
from twa_merge.alignment import SoupTensor
from twa_merge.blocks import TILE, Block
from twa_merge.errors import UserError
from twa_merge.groups import Groups, parameters_by_name
from twa_merge.kernels import Kernels
from twa_merge.originals import MappedFiles, OriginalBlock, in_order
from twa_merge.storage import block_maker, check_storage, kernels_for
from twa_merge.tensorfile import RangeReader, Window

if TYPE_CHECKING:
    from twa_merge.checkpoints import Soup

_AT_ONCE = 1 << 23
"""Elements of all checkpoints together that are read at a time."""
_IN_CACHE = 1 << 18
"""Elements of all checkpoints together that are centred at a time."""
_FILES_AT_ONCE = 8
_ROUNDING = 1e-9
"""By which the sum of weights may miss one."""
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
    centre_norms: Tensor
    """(G,) float64: `||m||` of each group."""
    storage: str = "float32"
    originals: Mapping[str, OriginalBlock] | None = None
    """Parameter name -> the checkpoints themselves, where deltas in float32 are not at hand."""
    gram: Tensor | None = None
    """(G, N, N) float64 inner products of the deltas, where they were asked for."""

    def __post_init__(self) -> None:
        self._row_of = {name: row for row, names in enumerate(self.groups.values()) for name in names}

    @property
    def num_checkpoints(self) -> int:
        return self.norms.shape[1]

    @property
    def centre_norm(self) -> float:
        """`||m||` of all parameters."""
        return float(self.centre_norms.square().sum().sqrt())

    @property
    def trainable_G(self) -> Tensor:
        """(G,) bool: groups in which any checkpoint differs; the others are copied."""
        return (self.norms > 0).any(dim=1)

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks.values())

    def row_of(self, name: str) -> int:
        return self._row_of[name]

    def combine(self, name: str, weights_N: Tensor, out: Tensor) -> None:
        """Write `sum_k w_k theta_k` of one parameter into `out`, of the parameter's shape and any float dtype."""
        block = self.blocks[name]
        block.combine(weights_N, out)
        more = float(weights_N.sum()) - 1
        if not block.holds_sums and abs(more) > _ROUNDING:  # of the linear span (eq. 1): the block has added one centre
            out.add_(block.centre().view(out.shape), alpha=more)

    def project(self, name: str, grad: Tensor, *, centre: bool = False) -> Tensor:
        """Return the (N,) gradient of the mixing weights, `<grad, theta_k>`, from the parameter's own (eq. 6).

        Args:
            name: of the parameter.
            grad: of its shape.
            centre: False leaves `<grad, m>` out, the same for all: it plays no part where weights sum to one.
        """
        products = self.blocks[name].project(grad)
        if not centre:
            return products
        held = self.blocks[name].centre()
        return products + torch.dot(held, grad.reshape(-1).to(held.dtype))

    def to(self, device: torch.device | str) -> None:
        """Move the blocks to a device."""
        for block in self.blocks.values():
            block.to(device)


def build_basis(
    soup: Soup,
    module: nn.Module,
    groups: Groups,
    *,
    storage: str = "float32",
    gram: bool = False,
    progress: bool = False,
) -> Basis:
    """Read every checkpoint once, a few elements of all checkpoints at a time, into centre and deltas.

    Of a module whose parameters are sharded over processes, each process reads and holds its own part.

    Args:
        soup: the checkpoints.
        module: gives names and shapes of the parameters; its values are not read.
        groups: a partition of the names in `mergeable_parameters(soup, module)`.
        storage: `float32`, `bfloat16`, `int8`, `int4`, or `disk`: nothing is held.
        gram: also find the inner products of the deltas, `N / 2` multiplications an element.

    Raises:
        UserError: a tensor holds NaN or infinity (checkpoint and tensor named), or has not the module's shape.
    """
    check_storage(storage)
    parameters = mergeable_parameters(soup, module)
    windows = {name: sharding.window_of(parameter) for name, parameter in parameters.items()}
    shares = sharding.shares_of(module)
    tensors = {name: _tensor_of(soup, name, parameter) for name, parameter in parameters.items()}
    numel = sum(window.numel for window in windows.values())
    originals = _originals(soup, tensors, windows, learns=storage == "disk")
    blocks: dict[str, Block] = dict(originals)
    if storage != "disk":
        make = block_maker(storage, len(soup), numel)
        blocks = {name: make(window.numel) for name, window in windows.items()}
    row_of = {name: row for row, names in enumerate(groups.values()) for name in names}
    squares = torch.zeros(len(groups), len(soup) + 1, dtype=torch.float64)
    grams = torch.zeros(len(groups), len(soup), len(soup), dtype=torch.float64) if gram else None
    total = sum(entry.dtype.itemsize * windows[name].numel for name in windows for entry in tensors[name].entries)
    with _Reader(soup) as reader, _bar(total, progress) as bar:
        for name, window in windows.items():
            for first, rows in reader.tiles(tensors[name], window):
                found, products = _put(blocks[name], first, rows, gram=gram)
                _require_finite(found, soup, tensors[name].name, rows)
                squares[row_of[name]] += shares[name] * found
                if grams is not None:
                    grams[row_of[name]] += shares[name] * products
                bar(sum(row.nbytes for row in rows))
    sharding.sum_over_processes(squares, module)
    if grams is not None:
        sharding.sum_over_processes(grams, module)
    norms, centre_norms = squares[:, :-1].sqrt(), squares[:, -1].sqrt()
    norms[norms <= _NOISE * centre_norms.unsqueeze(1)] = 0
    # one checkpoint that is far off moves the centre, and the others' weights are lost in the rounding of their deltas
    exact = storage == "float32" and float(norms.square().sum(dim=0).sqrt().max()) < float(
        centre_norms.square().sum().sqrt()
    )
    return Basis(blocks, groups, norms, centre_norms, storage, None if exact else originals, grams)


def mergeable_parameters(soup: Soup, module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's float parameters by name, tied ones once.

    What transformers does not save, since it is computed (Marian's sinusoidal positions), is left as it is.

    Raises:
        UserError: no checkpoint holds a parameter of the module, or a tensor is left over.
    """
    computed: Iterable[str] = getattr(module, "_keys_to_ignore_on_save", None) or ()  # type: ignore[assignment]
    parameters = parameters_by_name(module, lambda name: soup.tensor_of(name) is not None)
    found = {name: p for name, p in parameters.items() if p.is_floating_point()}
    for name in [name for name in found if name in computed and soup.tensor_of(name) is None]:
        if found.pop(name).is_meta or sharding.is_sharded(module):
            raise UserError(
                f"{type(module).__name__}: computes {name!r} itself, and cannot be spread; use --shard none"
            )
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


def _tensor_of(soup: Soup, name: str, parameter: nn.Parameter) -> SoupTensor:
    tensor = soup.tensor_of(name)
    assert tensor is not None
    for label, entry in zip(soup.labels, tensor.entries, strict=True):
        if entry.shape != tuple(parameter.shape):
            raise UserError(f"{label}: {name!r} has shape {list(entry.shape)}, the module {list(parameter.shape)}")
    return tensor


def _originals(
    soup: Soup, tensors: Mapping[str, SoupTensor], windows: Mapping[str, Window], *, learns: bool
) -> dict[str, OriginalBlock]:
    """Return the checkpoints' files as blocks; `learns`: steps will read them, not only scores now and then."""
    numel = sum(window.numel for window in windows.values())
    kernels = kernels_for(len(soup), numel) if learns else Kernels(compile=False)
    files = MappedFiles(owner=soup)
    blocks = {name: OriginalBlock(tensors[name].entries, window, files, kernels) for name, window in windows.items()}
    in_order(list(blocks.values()))
    return blocks


class _Reader:
    """Reads a tensor of every checkpoint in tiles, several files at a time. A context manager."""

    def __init__(self, soup: Soup) -> None:
        self._stack = ExitStack()
        self._readers = [self._stack.enter_context(RangeReader()) for _ in soup.labels]
        self._pool = self._stack.enter_context(ThreadPoolExecutor(min(_FILES_AT_ONCE, len(soup))))

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def tiles(self, tensor: SoupTensor, window: Window) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield (first element, N rows of values as they are on disk, valid until the next ones)."""
        size = max(1, _AT_ONCE // (len(self._readers) * TILE)) * TILE
        for first in range(0, window.numel, size):
            count = min(size, window.numel - first)
            reads = [
                self._pool.submit(reader.read, entry, first, count, window)
                for reader, entry in zip(self._readers, tensor.entries, strict=True)
            ]
            yield first, [read.result() for read in reads]


def _put(block: Block, first: int, rows: list[Tensor], *, gram: bool) -> tuple[Tensor, Tensor]:
    """Put centre and deltas into a parameter's block; return the (N + 1,) squares of their norms.

    And the deltas' (N, N) inner products, if `gram`; else zeros.
    """
    count, step = len(rows[0]), max(1, _IN_CACHE // (len(rows) * TILE)) * TILE
    squares = torch.zeros(len(rows) + 1, dtype=torch.float64)
    products = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    whole = torch.empty(len(rows), min(step, count), dtype=torch.float64)
    for start in range(0, count, step):
        values = whole[:, : min(step, count - start)]
        for row, value in zip(rows, values, strict=True):
            value.copy_(row[start : start + len(value)])
        centre = values.mean(dim=0)
        values -= centre
        block.put(first + start, values.float(), centre.float())
        squares[:-1] += torch.linalg.vector_norm(values, dim=1).square_()
        squares[-1] += torch.linalg.vector_norm(centre).square_()
        if gram:
            products += values @ values.T
    return squares, products


def _require_finite(squares: Tensor, soup: Soup, name: str, rows: list[Tensor]) -> None:
    """Raise if a checkpoint's values are not finite; the centre has made the others' deltas so too."""
    if torch.isfinite(squares.sum()):
        return
    for label, row in zip(soup.labels, rows, strict=True):
        if not torch.isfinite(row).all():
            raise UserError(f"{label}: tensor {name!r} holds NaN or infinity; leave this checkpoint out")


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[int], object]]:
    """Yield what moves a bar over so many bytes on."""
    if not progress:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="reading", unit="B", unit_scale=True, delay=2, disable=None) as bar:
        yield bar.update
