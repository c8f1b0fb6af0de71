"""Where a module reads a weight, it gets a view whose backward makes N numbers of the weight's gradient.

Links must be made where the weight is read, not up front: autograd runs nodes in the reverse of their making, and links
made first would keep every weight gradient alive to the end of the backward pass.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from twa_merge.errors import UserError
from twa_merge.groups import parameters_by_name

Project = Callable[[str, Tensor], Tensor]
"""(name of a parameter, its gradient) -> the gradient of all coefficients."""


class _Link(torch.autograd.Function):
    """Hands on a weight; its backward projects the weight's gradient on the basis (eq. 6)."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, parameter: Tensor, name: str, project: Project) -> Tensor:
        ctx.name, ctx.project = name, project
        # detach, not .data: the shared version counter reports a rewrite while a graph is open
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.project(ctx.name, grads[0]), None, None, None


class LinkedParameters(dict):  # type: ignore[type-arg]
    """A module's `_parameters`, whose items read one by one are linked views.

    `nn.Module.__getattr__` reads single items; state dicts, `named_parameters` and `_apply` iterate and so see the
    parameters themselves.
    """

    def __init__(self, owner: nn.Module, coefficients: Tensor, names: dict[str, str], project: Project) -> None:
        super().__init__(owner._parameters)
        # a strong reference would be a cycle, and keep basis and weights in memory until Python happens to look for one
        self.owner = weakref.ref(owner)
        self.coefficients, self.names, self.project = coefficients, names, project
        self.enabled = True

    def __getitem__(self, key: str) -> Any:
        parameter = super().__getitem__(key)
        name = self.names.get(key)
        if name is None or not self.enabled or not torch.is_grad_enabled():
            return parameter
        return _Link.apply(self.coefficients, parameter, name, self.project)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Make the module's parameters plain again."""
        owner = self.owner()
        if owner is not None:
            owner._parameters = dict(self)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # copies and pickles of the module are plain modules


def install_links(
    module: nn.Module, coefficients: Tensor, learnable: set[str], project: Project
) -> list[LinkedParameters]:
    """Link every reading of a module's `learnable` parameters to the coefficients.

    Raises:
        UserError: a module reads its weights past the links.
    """
    named = parameters_by_name(module, learnable.__contains__)
    canonical = {id(p): name for name, p in named.items() if name in learnable}
    links = []
    for owner in module.modules():
        names = {key: canonical[id(p)] for key, p in owner._parameters.items() if id(p) in canonical}
        if not names:
            continue
        if isinstance(owner, nn.RNNBase):
            raise UserError(
                f"{type(owner).__name__}: recurrent layers of torch keep a second list of their weights, past which "
                "coefficients cannot learn; not supported"
            )
        owner._parameters = LinkedParameters(owner, coefficients, names, project)
        links.append(owner._parameters)
    return links


@contextlib.contextmanager
def unlinked(links: list[LinkedParameters]) -> Iterator[None]:
    """Hand out the parameters themselves inside the block."""
    for link in links:
        link.enabled = False
    try:
        yield
    finally:
        for link in links:
            link.enabled = True
