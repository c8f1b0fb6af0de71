"""`MergedModel`: any module, whose only trainable parameters are the coefficients of a basis.

Paper: arXiv 2205.13104, eq. 5-7. The module keeps its own parameters as the buffer of the merged weights. Where it
reads one, it gets a view linked to the coefficients: the backward pass turns that weight's gradient into N numbers and
frees it at once, so no gradient, optimiser state or copy of size D exists.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twa_merge import buffers, sharding
from twa_merge.basis import Basis
from twa_merge.coordinates import coordinates_of
from twa_merge.dropout import restore_dropout, switch_off_dropout
from twa_merge.errors import UserError
from twa_merge.links import LinkedParameters, install_links, unlinked
from twa_merge.mixing import MixingWeights
from twa_merge.sharding import ShardedProjection


class MergedModel(nn.Module):
    """A module whose weights are a merge that trains.

    It behaves as the module does, in any loop, Accelerate or transformers' `Trainer`; `parameters()` and
    `state_dict()` hold the coefficients alone.

    Args:
        module: its parameters are overwritten with merged weights, its dropout is off until `merge_and_unload`.
        basis: centre and deltas of its parameters.
        checkpoints: N labels, for `mixing_weights()`.
        coordinates: `relative` trains shares of each delta (a step of lr moves every tensor by that share of its
            deltas); `normalized` trains the paper's coefficients of unit vectors (eq. 4).
        directions: what is trained along: the `deltas`, `orthogonal` ones of the same span, or its principal components
            (`pca`). The latter two need a basis with its Gram matrix.
        components: of `pca`, how many; default all.
        linear: train along the centre too: the linear span (eq. 1) in place of the affine one.
        start: mixing weights to start from; default the uniform soup (all coefficients zero).
        fingerprints: of the checkpoints (`Soup.fingerprints`), for `mixing_weights()`.
    """

    accepts_loss_kwargs: bool
    """Whether the module's loss divides by a count of items that is passed to it; else Trainer takes a mean of means
    over the steps of accumulation."""

    twa_coefficients: nn.Parameter
    """(G', R) float32: a row for each group that has a direction; R = N for deltas."""

    def __init__(
        self,
        module: nn.Module,
        basis: Basis,
        checkpoints: tuple[str, ...],
        *,
        coordinates: str = "relative",
        directions: str = "deltas",
        components: int | None = None,
        linear: bool = False,
        start: MixingWeights | None = None,
        fingerprints: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        # Kept out of the module tree: state dicts, DDP buffers and device maps then see the coefficients alone.
        _hide(self, module=module, basis=basis, linear=linear, accepts_loss_kwargs=_takes_item_count(module))
        _hide(self, checkpoints=checkpoints, fingerprints=fingerprints)
        _hide(self, _trained=[(p, p.requires_grad) for p in module.parameters()])
        _hide(self, _active=basis.trainable_G.nonzero().flatten(), _combined=None, _placed=None)
        position = (basis.trainable_G.cumsum(0) - 1).masked_fill(~basis.trainable_G, -1)
        _hide(self, _position=position.tolist())
        found = coordinates_of(
            basis, self._active, coordinates=coordinates, directions=directions, components=components, centre=linear
        )
        _hide(self, coordinates=found)
        self.twa_coefficients = nn.Parameter(torch.zeros(found.matrix.shape[:2], dtype=torch.float32))
        learnable = {name for name in basis.blocks if self._position[basis.row_of(name)] >= 0}
        # not a method: bound to this model, it would make a cycle of model, module and basis
        project = _Projection(basis, self._position, found.matrix, self.twa_coefficients, linear=linear)
        links: list[LinkedParameters] = []
        projection = None
        if sharding.is_sharded(module):
            projection = ShardedProjection(module, self.twa_coefficients, learnable, project)
        else:
            links = install_links(module, self.twa_coefficients, learnable, project)
            for parameter in module.parameters():
                parameter.requires_grad_(False)
        _hide(self, _links=links, _projection=projection)
        _hide(self, _dropout=switch_off_dropout(module))
        self.__class__ = _with_signature_of(type(self), module)
        self.start_from(start)

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold parts of the module."""
        return self._projection is not None

    # --- coefficients -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start_from(self, weights: MixingWeights | None) -> None:
        """Set the coefficients to those of a merge (None: the uniform soup)."""
        if weights is None:
            self.twa_coefficients.zero_()
        else:
            self.twa_coefficients.copy_(self.coordinates.coefficients(self._rows_of(weights)[self._active]))
        self.refresh()

    def mixing_weights(self) -> MixingWeights:
        """Return the current coefficients as a table, `w_k = a_k + (1 - sum(a)) / N`."""
        return self.weights_of(self.table_GN())

    def weights_of(self, table_GN: Tensor) -> MixingWeights:
        """Return a table of this model's groups and checkpoints as mixing weights."""
        return MixingWeights(
            table_GN, self.basis.groups, self.checkpoints, fingerprints=self.fingerprints, linear=self.linear
        )

    @torch.no_grad()
    def table_GN(self) -> Tensor:
        """Return the (G, N) float64 mixing weights of the current coefficients, unchecked."""
        table: Tensor = torch.full_like(self.basis.norms, 1 / self.basis.num_checkpoints)
        table[self._active] = self.coordinates.weights(self.twa_coefficients.detach().cpu())
        return table

    @torch.no_grad()
    def refresh(self) -> None:
        """Recombine the weights if the coefficients changed since.

        Changes are found by value: fused optimisers and `.data` writes do not bump a tensor's version.
        """
        now = self.twa_coefficients.detach()
        if self._combined is None or self._combined.device != now.device or not torch.equal(now, self._combined):
            table_GN = self.table_GN()
            self._combine(lambda name: table_GN[self.basis.row_of(name)])
            _hide(self, _combined=now.clone())

    def _combine(self, row: Callable[[str], Tensor]) -> None:
        _hide(self, _combined=None, _placed=None)
        with _full_precision(self.twa_coefficients):
            for name, part in self._parts():
                self.basis.combine(name, row(name), out=part)

    def _place(self, weights: MixingWeights) -> None:
        """Put a table's weights in place, from the checkpoints themselves where the basis is not exact."""
        originals, before = self.basis.originals, self._placed
        if originals is None:
            return self._combine(weights.row)
        _hide(self, _combined=None, _placed=None)
        with _full_precision(self.twa_coefficients):
            for name, part in self._parts():
                if before is None:
                    originals[name].combine(weights.row(name), part)
                else:
                    originals[name].update(before.row(name), weights.row(name), part)
        _hide(self, _placed=weights)
        return None

    def _parts(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every merged parameter, or the part of it that this process holds."""
        if self.is_sharded:
            sharding.free_gathered(self.module)
        for name, part in sharding.named_parts(self.module):
            if name in self.basis.blocks:
                yield name, part

    def _rows_of(self, weights: MixingWeights) -> Tensor:
        if len(weights.groups) == 1:
            return weights.table.expand(len(self.basis.groups), -1)
        rows = []
        for group, names in self.basis.groups.items():
            rows.append(weights.row(names[0]))
            if any(not torch.equal(weights.row(name), rows[-1]) for name in names[1:]):
                raise UserError(f"mixing weights: differ inside the group {group!r}; start from a coarser table")
        return torch.stack(rows)

    # --- the module, with merged weights ---------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output at the current coefficients."""
        self.refresh()
        if self._projection is not None:
            self._projection.forget()
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def materialized(self, weights: MixingWeights | None = None) -> Iterator[nn.Module]:
        """Yield the plain module with a merge in place: for evaluation, `generate`, pipelines, scoring of baselines.

        A table's weights are exact, read from the checkpoints, also where the basis is held in few bits; the present
        coefficients (None) are those that learn, on the deltas as they are held.

        Running statistics and other buffers are the table's where it has any, else left as they are.
        """
        before = buffers.float_buffers(self.module)
        with torch.no_grad():
            if weights is None:
                self.refresh()
            else:
                self._place(weights)
                buffers.load_buffers(self.module, dict(weights.statistics))
        try:
            with unlinked(self._links):
                yield self.module
        finally:
            buffers.load_buffers(self.module, before)

    def merge_and_unload(self) -> nn.Module:
        """Return the plain module with the current merge in its parameters, as PEFT's method of this name does.

        The merge is exact, whatever the basis is held in. Dropout is back, and what trained before trains again; this
        wrapper is of no use afterwards.
        """
        with torch.no_grad():
            self._place(self.mixing_weights())
        return self.unload()

    def unload(self) -> nn.Module:
        """Return the plain module with whatever weights are in it, as PEFT's method of this name does."""
        for link in self._links:
            link.remove()
        if self._projection is not None:
            self._projection.remove()
        restore_dropout(self._dropout)
        for parameter, trains in self._trained:
            parameter.requires_grad_(trains)
        module: nn.Module = self.module
        return module

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Save the merged module as combined in float32 from the checkpoints, with `mixing_weights.*`.

        `twa_merge.write` combines in float64 and rounds once, in the checkpoints' own dtypes, names and shards.

        Raises:
            UserError: the module is spread over processes, and none holds it.
        """
        if self._projection is not None:
            raise UserError(
                f"{folder}: the model is spread over processes; save it with twa_merge.write(soup, "
                "model.mixing_weights(), folder)"
            )
        restore_dropout(self._dropout)  # the rates stand in the config that is saved
        try:
            with self.materialized(self.mixing_weights()) as module:
                module.save_pretrained(folder, **kwargs)  # type: ignore[operator]
        finally:
            _hide(self, _dropout=switch_off_dropout(self.module))
        self.mixing_weights().save(Path(folder))

    def print_trainable_parameters(self) -> None:
        """Print how few numbers train."""
        total = sum(p.numel() for p in self.module.parameters())
        count = self.twa_coefficients.numel()
        print(f"trainable params: {count:,} || all params: {total:,} || trainable%: {100 * count / total:.4f}")

    def _get_name(self) -> str:
        """Return the module's: Trainer finds out by it whether labels are shifted."""
        return type(self.module).__name__

    def train(self, mode: bool = True) -> MergedModel:
        """Set the mode of wrapper and module."""
        super().train(mode)
        self.module.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in self.__dict__:
                raise
            found = getattr(self.__dict__["module"], name)
            return self._refreshing(found) if inspect.ismethod(found) else found

    def _refreshing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method of the module (`generate`, `get_image_features`) that reads the weights as they are then."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.refresh()
            return method(*args, **kwargs)

        return call

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergedModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.twa_coefficients.data = self.twa_coefficients.data.float()
        self.module._apply(fn, recurse)
        self.basis.to(self.twa_coefficients.device)
        _hide(self, _combined=None, _placed=None)
        return self


class _Projection:
    """Makes the coefficients' gradient of a parameter's own (eq. 6): zero outside the parameter's group.

    Args:
        basis: of the parameters.
        position: of each group among those that train; -1 for the others.
        matrix_GRN: makes mixing weights of coefficients.
        coefficients_GR: give the gradient's shape and device.
        linear: weights need not sum to one.
    """

    def __init__(
        self, basis: Basis, position: list[int], matrix_GRN: Tensor, coefficients_GR: Tensor, *, linear: bool
    ) -> None:
        self.basis, self.position, self.linear = basis, position, linear
        self.coefficients_GR, self.matrix_GRN = coefficients_GR, matrix_GRN.float()

    def __call__(self, name: str, grad: Tensor) -> Tensor:
        row = self.position[self.basis.row_of(name)]
        grad_GR = torch.zeros_like(self.coefficients_GR)
        if self.matrix_GRN.device != grad_GR.device:
            self.matrix_GRN = self.matrix_GRN.to(grad_GR.device)
        with _full_precision(grad):
            grad_GR[row] = self.matrix_GRN[row] @ self.basis.project(name, grad, centre=self.linear)
        return grad_GR


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast is for the model's own products: a merge in bfloat16 would lose the deltas."""
    return torch.autocast(tensor.device.type, enabled=False)


def _hide(model: MergedModel, **attributes: Any) -> None:
    """Set attributes that `nn.Module` must not register as submodules, parameters or buffers."""
    for name, value in attributes.items():
        object.__setattr__(model, name, value)


def _with_signature_of(cls: type[MergedModel], module: nn.Module) -> type[MergedModel]:
    """Return a subclass whose `forward` shows the module's signature: Trainer picks columns and labels by it."""

    def forward(self: MergedModel, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(type(module).forward)  # type: ignore[attr-defined]
    # Trainer finds the labels of question answering by the class's name
    return type(f"Merged{type(module).__name__}", (cls,), {"forward": forward, "__doc__": cls.__doc__})


def _takes_item_count(module: nn.Module) -> bool:
    """Whether `num_items_in_batch` reaches the module's loss, and the loss divides by it.

    Trainer takes it for granted where `forward` has keyword arguments, which the losses of classification ignore.
    """
    forward = inspect.unwrap(type(module).forward)
    passes = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())
    if not getattr(module, "accepts_loss_kwargs", passes) or not passes:
        return False
    code = getattr(forward, "__code__", None)
    loss = getattr(module, "loss_function", None) if code is not None and "loss_function" in code.co_names else None
    return callable(loss) and "num_items_in_batch" in inspect.signature(loss).parameters
