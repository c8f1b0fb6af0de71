"""How coefficients are learned. The defaults and how they were chosen: `docs/defaults.md`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from twa_merge.errors import UserError

MIN_STEPS = 100
"""Few held-out samples must not mean few steps: coefficients start at the average and have a way to go."""


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    """Settings of one training of the coefficients."""

    granularity: str | list[str] = "tensor"
    """Which parameters share a row: `model`, `layer`, `tensor`, or name patterns."""
    coordinates: str = "relative"
    """`relative` (shares of each delta) or `normalized` (the paper's unit vectors, eq. 4)."""
    directions: str = "deltas"
    """`deltas`, `orthogonal` ones of the same span (Gram-Schmidt), or its principal components, `pca`."""
    components: int | None = None
    """Of `pca`, how many; default all."""
    linear: bool = False
    """Learn the scale of the centre too: the linear span of eq. 1, in which weights need not sum to one."""
    storage: str = "auto"
    """Of the deltas: `float32`, `bfloat16`, `int8`, `int4`, `disk`, or `auto`, the most exact that fits."""
    shard: str = "none"
    """What several processes share, instead of each holding all of it: `none`, `basis`, or `model`, whose weights are
    then gathered a layer at a time."""
    start: str = "uniform"
    """Where coefficients start: `uniform`, `greedy` or `best`."""
    optimizer: str = "adamw"
    """`adamw`, or `sgd` with momentum, the paper's for the head of training (sec. 6.1)."""
    momentum: float = 0.9
    """Of SGD."""
    lr: float = 0.03
    steps: int | None = None
    """Optimisation steps; default `epochs` over the data, and at least `MIN_STEPS`."""
    epochs: float = 5
    batch_size: int = 32
    """Samples of one forward pass, all processes together."""
    accumulation: int = 1
    """Forward passes in one step."""
    warmup: float = 0.1
    """Share of the steps with rising learning rate, before the cosine."""
    weight_decay: float = 0.0
    """Decay of the coefficients (AdamW's is decoupled from the gradient), towards the uniform soup."""
    regularization: float = 1e-5
    """lambda of eq. 2: `lambda / 2 * ||c||^2` is added to the loss."""
    evaluations: int = 20
    """How often the select part is scored; the best of them is kept."""
    patience: int = 8
    """Stop after this many evaluations without a better one."""
    mixed_precision: str = "no"
    """`no` or `bf16` (fp16 would need its gradients scaled)."""
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "accumulation": 1, "evaluations": 1, "patience": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"learn.{name}: expected at least {low}, got {value}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise UserError(f"learn.lr: expected a number above 0, got {self.lr}")
        if not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise UserError(f"learn.epochs: expected a number above 0, got {self.epochs}")
        choices = {
            "storage": ("auto", "float32", "bfloat16", "int8", "int4", "disk"),
            "shard": ("none", "basis", "model"),
            "coordinates": ("relative", "normalized"),
            "directions": ("deltas", "orthogonal", "pca"),
            "start": ("uniform", "greedy", "best"),
            "optimizer": ("adamw", "sgd"),
            "mixed_precision": ("no", "bf16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                wanted = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
                raise UserError(f"learn.{name}: expected {wanted}, got {getattr(self, name)!r}")
        for name in ("weight_decay", "regularization"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"learn.{name}: expected 0 or more, got {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"learn.seed: expected a number from 0 to {(1 << 32) - 1}, got {self.seed}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"learn.momentum: expected 0 up to but not including 1, got {self.momentum}")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"learn.warmup: expected a share of the steps, 0 to 1, got {self.warmup}")

    def total_steps(self, num_samples: int) -> int:
        """Return how many steps are taken on so many samples, unless an early stop comes first."""
        if self.steps is not None:
            return self.steps
        return max(MIN_STEPS, math.ceil(self.epochs * num_samples / (self.batch_size * self.accumulation)))
