"""The three pictures of a report. The only module that knows matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from twa_merge.league import Candidate
from twa_merge.mixing import MixingWeights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEARNED, _FIXED, _OPTIMISTIC = "#d95f02", "#5b7a99", "#b9c6d2"


def plot_league(candidates: list[Candidate], winner: Candidate, path: Path) -> None:
    """Draw loss with its standard error: on the test split where there is one, else on the select part."""
    part = "test" if all(c.test for c in candidates) else "select"
    figure, axes = _figure(7.0, 0.8 + 0.42 * len(candidates))
    for y, c in enumerate(candidates):
        loss = getattr(c, part).loss
        color = _LEARNED if c.learned else _OPTIMISTIC if c.optimistic else _FIXED
        axes.errorbar(loss.value, y, xerr=loss.standard_error, fmt="o", color=color, capsize=4, markersize=7)
        label = f"{loss.value:.4f}" + ("  ships" if c is winner else "")
        axes.annotate(label, (loss.value, y), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(candidates)), [c.name for c in candidates])
    axes.set_ylim(len(candidates) - 0.4, -0.7)
    axes.set_xlabel(f"{part} loss ± standard error (lower is better)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)


def plot_mixing_weights(weights: MixingWeights, path: Path) -> None:
    """Draw the table as a heat map, groups by checkpoints, centred at the uniform soup."""
    table = weights.table.numpy()
    num_groups, num_checkpoints = table.shape
    figure, axes = _figure(3.5 + 0.45 * num_checkpoints, min(14.0, 1.6 + 0.2 * num_groups))
    centre = 1 / num_checkpoints
    reach = max(abs(table - centre).max(), 1e-9)
    picture = axes.imshow(table, aspect="auto", cmap="PuOr_r", vmin=centre - reach, vmax=centre + reach)
    every = max(1, -(-num_groups // 60))
    axes.set_yticks(range(0, num_groups, every), [_short(g, 44) for g in list(weights.groups)[::every]], fontsize=6)
    names = [_short(Path(name).name, 18) for name in weights.checkpoints]
    axes.set_xticks(range(num_checkpoints), names, rotation=60, ha="right", fontsize=7)
    figure.colorbar(picture, ax=axes, label=f"mixing weight (uniform: {centre:.3g})")
    figure.savefig(path, dpi=150)


def plot_curve(curves: list[list[dict[str, float]]], samples: list[int], best_step: int, path: Path) -> None:
    """Draw fit and select loss over the steps, and the step that was chosen.

    Args:
        curves: one for each fold; with several, thin lines, and a thick one for their mean over the select samples.
        samples: select samples of each fold.
        best_step: the step whose tables are used.
    """
    figure, axes = _figure(6.0, 3.6)
    reached = range(min(map(len, curves)))
    steps = [curves[0][e]["step"] for e in reached]
    select = [np.average([curve[e]["select_loss"] for curve in curves], weights=samples) for e in reached]
    for curve in curves if len(curves) > 1 else ():
        axes.plot([r["step"] for r in curve], [r["select_loss"] for r in curve], color=_LEARNED, alpha=0.3, lw=0.8)
    axes.plot(steps, select, color=_LEARNED, lw=2, label="select" + (" (mean of folds)" if len(curves) > 1 else ""))
    fit = [np.mean([curve[e]["fit_loss"] for curve in curves]) for e in reached if e > 0]
    axes.plot(steps[1:], fit, color=_FIXED, label="fit (while learning)")
    axes.axvline(best_step, color="0.4", ls="--", lw=1, label=f"step {best_step} is used")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    # Figures made without pyplot leave the caller's backend and open figures alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
