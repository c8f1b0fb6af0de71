"""Running statistics of BatchNorm belong to the weights they were computed with: a merge needs its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


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


@torch.no_grad()
def load_statistics(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Put running statistics in place."""
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
