"""Buffers of a merge. Running statistics of BatchNorm belong to the weights they were computed with: a merge needs its
own. Other floating point buffers are averaged as parameters are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from twa_merge.checkpoints import Soup


STATISTICS_SAMPLES = 2048
"""From which running statistics of every candidate are recomputed; measured in docs/method.md."""


def has_batchnorm(module: nn.Module) -> bool:
    """Whether the module keeps running statistics."""
    return any(isinstance(m, _BatchNorm) and m.track_running_stats for m in module.modules())


def recompute(module: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]) -> None:
    """Recompute the running statistics in place: the average over `batches` of each batch's statistics.

    Uses `torch.optim.swa_utils.update_bn` (Izmailov et al. 2018, SWA). Batches are weighed alike.
    """
    from torch.optim.swa_utils import update_bn

    if not has_batchnorm(module):
        return
    was_training = module.training
    # update_bn takes the first element of a batch that is a list or tuple: a dict passes whole
    update_bn(({"batch": batch} for batch in batches), _Feed(module, forward))
    module.train(was_training)


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all running statistics by buffer name."""
    found = {}
    for prefix, inner in module.named_modules():
        if isinstance(inner, _BatchNorm) and inner.track_running_stats:
            for name in ("running_mean", "running_var"):
                found[f"{prefix}.{name}" if prefix else name] = getattr(inner, name).detach().cpu().clone()
    return found


def float_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all floating point buffers by name."""
    return {n: b.detach().cpu().clone() for n, b in module.named_buffers() if b.is_floating_point()}


def averaged(module: nn.Module, soup: Soup, weights_N: Sequence[float] | Tensor) -> dict[str, Tensor]:
    """Return the weighted average over checkpoints of every floating point buffer that they hold."""
    found = {}
    for name, own in float_buffers(module).items():
        if soup.tensor_of(name) is None:
            continue
        total = torch.zeros(own.shape, dtype=torch.float64)
        for k, weight in enumerate(weights_N):
            if weight != 0:
                total += float(weight) * soup.read(k, name).double()
        found[name] = total.to(own.dtype)
    return found


@torch.no_grad()
def load_buffers(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Put buffers in place."""
    buffers = dict(module.named_buffers())
    for name, value in values.items():
        buffers[name].copy_(value)


class _Feed(nn.Module):
    """Makes any kind of batch the single argument that `update_bn` passes on."""

    def __init__(self, module: nn.Module, forward: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.module = module
        self.call = forward

    def forward(self, batch: Any) -> Any:
        return self.call(self.module, batch["batch"])
