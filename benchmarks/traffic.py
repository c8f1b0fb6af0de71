"""Counts what processes send each other: every collective of torch.distributed, with its tensors' bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """A context manager: `calls` and `nbytes` of each kind of collective inside the block.

    Bytes are those of the whole result of a gather, of the whole input of a scatter, of the tensor of an all-reduce.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, counted if it is a collective."""
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1].strip("_")
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.calls[name] += 1
            self.nbytes[name] += max((tensor.nbytes for tensor in tensors), default=0)
        return func(*args, **(kwargs or {}))
