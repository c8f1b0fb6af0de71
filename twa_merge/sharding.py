"""Models, and with them bases, whose parameters are spread over processes: torch's `fully_shard` does the exchange.

Each process holds a part of every parameter: it combines that part, `fully_shard` gathers a layer's weights where they
are used and scatters the sum of their gradients, and the part that comes back is projected where it lies. What is left
to exchange are the products, `G x N` numbers. Paper: arXiv 2205.13104, sec. 3.4, splits checkpoints instead, which
moves twice as many bytes and is uneven where K does not divide N.

Legend: K processes, G groups, N checkpoints.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from twa_merge.errors import UserError
from twa_merge.groups import parameters_by_name
from twa_merge.tensorfile import Window

SHARDS = ("none", "basis", "model")
"""What processes share: nothing, the basis, or the model too."""
_EVEN = 1.01
"""A shard this much larger than the average is as good as even."""


def shard(module: nn.Module, mesh: Any, *, layers: bool) -> None:
    """Spread a module's parameters over the processes of a one-dimensional device mesh.

    Args:
        module: on one device, or on `meta` and filled later.
        layers: free a layer's weights after its forward pass and gather them again for its backward pass, so that no
            process ever holds all of them; otherwise they stay from the forward to the backward pass.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    options: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": {p for p in module.parameters() if p.dim() == 0},  # fully_shard takes no scalars
        "shard_placement_fn": functools.partial(_placement, size=mesh.size()),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    names = [name for name, _ in module.named_parameters()]
    try:
        for layer in layers_of(module):
            fully_shard(layer, reshard_after_forward=layers, **options)
        fully_shard(module, reshard_after_forward=layers, **options)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{type(module).__name__}: fully_shard cannot spread it ({error}); use --shard none") from error
    if [name for name, _ in module.named_parameters()] != names:
        raise UserError(f"{type(module).__name__}: its tied weights would come apart when spread; use --shard none")
    if hasattr(module, "generate"):
        register_fsdp_forward_method(module, "generate")  # it reads weights outside of `forward` too
        # transformers then keeps all processes at it until the last one has finished
        module._is_fsdp_managed_module = True  # type: ignore[assignment]


def make_room(module: nn.Module, device: torch.device | str) -> None:
    """Allocate the parts of a sharded module that are on `meta`, without values; buffers keep theirs."""
    if not any(parameter.is_meta for parameter in module.parameters()):
        return
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers(remove_duplicate=False)}
    module.to_empty(device=device)
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Return the items of the outermost lists of modules: the layers, of any architecture.

    Those that share a parameter with another layer, or with what is outside of all of them, are left out.
    """
    layers = list({id(layer): layer for layer in _items(module)}.values())
    inside = {id(inner) for layer in layers for inner in layer.modules()}
    outside = {id(p) for inner in module.modules() if id(inner) not in inside for p in inner._parameters.values()}
    users = Counter(id(p) for layer in layers for p in set(layer.parameters()))
    return [
        layer
        for layer in layers
        if any(True for _ in layer.parameters())
        and not any(users[id(p)] > 1 or id(p) in outside for p in layer.parameters())
    ]


def _items(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if not isinstance(child, nn.ModuleList | nn.Sequential):
            yield from _items(child)
            continue
        for item in child:  # a list in a list is never called itself
            yield from _items(nn.ModuleList([item])) if isinstance(item, nn.ModuleList) else [item]


def is_sharded(module: nn.Module) -> bool:
    """Whether processes hold parts of the module's parameters."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(inner, FSDPModule) for inner in module.modules())


def window_of(parameter: Any) -> Window:
    """Return which elements of a parameter this process holds."""
    if not is_dtensor(parameter):
        return Window.whole(parameter.numel())
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    dim = parameter.placements[0].dim
    return Window.slice(tuple(parameter.shape), dim, offset[dim] if shape[dim] else 0, shape[dim])


def shares_of(module: nn.Module) -> dict[str, float]:
    """Return what a sum over processes must count each parameter's part with: one that all of them hold, 1 / K."""
    mesh = _mesh_of(module)
    whole = 1.0 if mesh is None else 1 / int(mesh.size())
    named = module.named_parameters(remove_duplicate=False)
    return {name: 1.0 if is_dtensor(p) else whole for name, p in named}


def named_parts(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter's names and the part that this process holds, detached, sharing memory."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        # detach, not .data: the write then counts for graphs that are still open, and (unless sharded) they raise
        yield name, _local(parameter.detach())


def free_gathered(module: nn.Module) -> None:
    """Drop weights that were gathered earlier: the parts are about to change."""
    from torch.distributed.fsdp import FSDPModule

    for inner in module.modules():
        if isinstance(inner, FSDPModule):
            inner.reshard()


def sum_over_processes(values: Tensor, module: nn.Module) -> None:
    """Add up a tensor, in place, over the processes that a module is spread over."""
    mesh = _mesh_of(module)
    if mesh is not None:
        _all_reduce(values, mesh)


class ShardedProjection:
    """Turns the gradients of a sharded module's parameters into that of the coefficients, as each of them arrives.

    Args:
        module: sharded by `shard`.
        coefficients: whose `grad` is added to at the end of every backward pass, averaged over processes as by DDP.
        learnable: names of parameters with a direction.
        project: (name, this process's part of the gradient) -> the gradient of all coefficients.
    """

    def __init__(
        self, module: nn.Module, coefficients: Tensor, learnable: set[str], project: Callable[[str, Tensor], Tensor]
    ) -> None:
        self._coefficients, self._project = coefficients, project
        # asked now: while weights are gathered, the module shows them in place of the parts
        self._mesh, self._shares = _mesh_of(module), shares_of(module)
        self._totals: dict[bool, Tensor] = {}
        self._handles = []
        for name, parameter in parameters_by_name(module, learnable.__contains__).items():
            parameter.requires_grad_(name in learnable)
            if name in learnable:
                hook = functools.partial(self._take, name)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Drop what a backward pass that failed has left."""
        self._totals = {}

    def remove(self) -> None:
        """Make the module's gradients plain again."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _take(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        products = self._shares[name] * self._project(name, _local(parameter.grad))
        parameter.grad = None
        if not self._totals:
            # after fully_shard's own callback, which hands in the last gradients and waits for its streams
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # type: ignore[attr-defined]
        # apart: on GPUs, parts arrive on fully_shard's stream, and what all processes hold on autograd's
        in_parts = self._shares[name] == 1
        self._totals[in_parts] = products + self._totals[in_parts] if in_parts in self._totals else products

    def _finish(self) -> None:
        total = torch.stack(list(self._totals.values())).sum(dim=0)
        self._totals = {}
        _all_reduce(total, self._mesh)
        grad = self._coefficients.grad
        self._coefficients.grad = total if grad is None else grad + total


def _placement(parameter: nn.Parameter, *, size: int) -> Any:
    """Return the dimension to split: the first, or a more even one: experts can be fewer than processes."""
    from torch.distributed.tensor import Shard

    if -(-parameter.shape[0] // size) * size <= _EVEN * parameter.shape[0]:
        return Shard(0)
    return Shard(next((dim for dim, extent in enumerate(parameter.shape) if extent % size == 0), 0))


def _mesh_of(module: nn.Module) -> Any:
    """Return the mesh that a module is spread over, or None."""
    return next((p.device_mesh for p in module.parameters() if is_dtensor(p)), None)  # type: ignore[attr-defined]


def _all_reduce(values: Tensor, mesh: Any) -> None:
    moved = values.to(mesh.device_type)
    torch.distributed.all_reduce(moved, group=mesh.get_group())
    values.copy_(moved)


def _local(tensor: Any) -> Tensor:
    part: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor
    return part


def is_dtensor(tensor: Any) -> bool:
    """Whether processes hold parts of a tensor."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
