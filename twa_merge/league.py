"""Every candidate scored on the same samples, and which of them ships."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from twa_merge import buffers, mixing
from twa_merge.baselines import best_single, greedy_soup
from twa_merge.checkpoints import Soup
from twa_merge.errors import UserError
from twa_merge.evaluation import Evaluation, evaluate, paired_difference
from twa_merge.mixing import MixingWeights
from twa_merge.model import MergedModel
from twa_merge.random_numbers import fixed_random_numbers
from twa_merge.tasks import Task, to_device

if TYPE_CHECKING:
    from accelerate import Accelerator

Folds = Sequence[tuple[list[int], list[int]]]
"""(fit, select) positions in the held-out data: one pair, or cross-fitting folds that select every sample once."""


@dataclass
class Candidate:
    """A row of the league table."""

    name: str
    weights: MixingWeights
    select: Evaluation
    """On the select part; with folds, each fold's choice on the samples it has not seen."""
    fit: Evaluation | None = None
    test: Evaluation | None = None
    passes: float = 0.0
    """Passes over the held-out data that finding this candidate took, forward only or forward and backward."""
    learned: bool = False
    optimistic: bool = False
    """Chosen with the select part in view; shown, but never shipped."""


class Scorer:
    """Scores tables on the model in memory, without writing them.

    Args:
        statistics_batches: batches to recompute BatchNorm from; None where the module has none.
    """

    def __init__(
        self,
        model: MergedModel,
        soup: Soup,
        task: Task,
        held_out: Any,
        *,
        batch_size: int,
        accelerator: Accelerator,
        statistics_batches: Callable[[], Any] | None = None,
        progress: bool = False,
    ) -> None:
        self.model, self.soup, self.task, self.held_out = model, soup, task, held_out
        self.batch_size, self.accelerator, self.progress = batch_size, accelerator, progress
        self.statistics_batches = statistics_batches
        self.passes = 0.0
        self._cache: dict[bytes, Evaluation] = {}

    def with_statistics(self, weights: MixingWeights) -> MixingWeights:
        """Return the table with the buffers that belong to it.

        BatchNorm's running statistics are recomputed, other floating point buffers averaged; a single checkpoint keeps
        its own.
        """
        if weights.statistics:
            return weights
        only = weights.one_hot_column()
        weights_N = weights.mean_N if only is None else weights.table[0]
        averaged = buffers.averaged(self.model.module, self.soup, weights_N)
        found = replace(weights, statistics=averaged)
        if only is not None or not buffers.has_batchnorm(self.model.module):
            return found
        with self.model.materialized(found) as module:
            self.recompute(module)
            return replace(weights, statistics=averaged | buffers.statistics(module))

    def recompute(self, module: torch.nn.Module) -> None:
        """Recompute BatchNorm's running statistics in place."""
        assert self.statistics_batches is not None
        device = self.accelerator.device
        batches = (to_device(batch, device) for batch in self.statistics_batches())
        with torch.no_grad(), self.accelerator.autocast(), fixed_random_numbers():
            buffers.recompute(module, batches, self.task.forward)
        self.passes += 1

    def __call__(self, weights: MixingWeights) -> Evaluation:
        """Return the evaluation of a table on all held-out samples; asked twice, it is computed once."""
        key = weights.table.numpy().tobytes()
        if key not in self._cache:
            self._cache[key] = self.on(weights, self.held_out)
            self.passes += 1
        return self._cache[key]

    def on(self, weights: MixingWeights, dataset: Any) -> Evaluation:
        """Return the evaluation of a table on other samples."""
        with self.model.materialized(self.with_statistics(weights)) as module:
            return evaluate(
                module, dataset, self.task, batch_size=self.batch_size, accelerator=self.accelerator,
                progress=self.progress,
            )  # fmt: skip


def pool(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Join evaluations of different samples into one."""
    first = evaluations[0]
    if len(evaluations) == 1:
        return first
    return replace(
        first,
        losses_S=np.concatenate([e.losses_S for e in evaluations]),
        weights_S=np.concatenate([e.weights_S for e in evaluations]),
        predictions=[p for e in evaluations for p in e.predictions],
        references=[r for e in evaluations for r in e.references],
    )


def baselines(scorer: Scorer, checkpoints: tuple[str, ...], folds: Folds, *, ordered: bool) -> list[Candidate]:
    """Score the merges that need no gradient, each selected on the fit part alone.

    Args:
        ordered: the checkpoints are snapshots of one run in order: add last-k (LAWA) and EMA.
    """
    found = [
        _selected("best single", scorer, checkpoints, folds, best_single),
        _selected("uniform", scorer, checkpoints, folds, lambda names, score: mixing.uniform(names)),
        _selected("greedy", scorer, checkpoints, folds, greedy_soup),
    ]
    if ordered:

        def choose_last(names: tuple[str, ...], score: Callable[[MixingWeights], float]) -> MixingWeights:
            return min((mixing.last_k(k, names) for k in last_counts(len(names))), key=score)

        def choose_ema(names: tuple[str, ...], score: Callable[[MixingWeights], float]) -> MixingWeights:
            return min((mixing.ema(decay, names) for decay in (0.5, 0.7, 0.8, 0.9)), key=score)

        found.append(_selected("last-k (LAWA)", scorer, checkpoints, folds, choose_last))
        found.append(_selected("EMA", scorer, checkpoints, folds, choose_ema))
    if len(folds) == 1:
        everything = sorted({*folds[0][0], *folds[0][1]})
        whole = _selected("greedy (fit + select)", scorer, checkpoints, [(everything, folds[0][1])], greedy_soup)
        found.append(replace(whole, optimistic=True))
    return found


def last_counts(n: int) -> list[int]:
    """Return the k of last-k that are tried: 1, 2, 3, 4, 6, 8, 12, ... and all; those between differ little."""
    halves = [2**power * odd for power in range(n.bit_length()) for odd in (2, 3)]
    return sorted({1, n, *(k for k in halves if k < n)})


def _selected(
    name: str,
    scorer: Scorer,
    checkpoints: tuple[str, ...],
    folds: Folds,
    choose: Callable[[tuple[str, ...], Callable[[MixingWeights], float]], MixingWeights],
) -> Candidate:
    before = scorer.passes
    chosen = [choose(checkpoints, _loss_on(scorer, fit)) for fit, _ in folds]
    select = pool([scorer(w).subset(part) for w, (_, part) in zip(chosen, folds, strict=True)])
    weights = chosen[0] if len(folds) == 1 else choose(checkpoints, _loss_on(scorer, None))
    fit = scorer(weights).subset(folds[0][0]) if len(folds) == 1 else scorer(weights)
    return Candidate(name, weights, select, fit, passes=scorer.passes - before)


def _loss_on(scorer: Scorer, part: list[int] | None) -> Callable[[MixingWeights], float]:
    def loss(weights: MixingWeights) -> float:
        evaluation = scorer(weights)
        return (evaluation if part is None else evaluation.subset(part)).ranking_loss

    return loss


@dataclass(frozen=True)
class Verdict:
    """Which candidate ships, and why."""

    winner: Candidate
    reason: str


def best_baseline(candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate with the lowest select loss that was neither learned nor chosen with that part in view."""
    return min((c for c in candidates if not c.learned and not c.optimistic), key=lambda c: c.select.ranking_loss)


def require_finite(candidates: Sequence[Candidate]) -> None:
    """Raise if there is nothing to decide by.

    Raises:
        UserError: no baseline's select loss is finite.
    """
    if math.isinf(best_baseline(candidates).select.ranking_loss):
        raise UserError(
            "no candidate has a finite loss on the held-out samples that decide: do they have labels, or do the "
            "checkpoints hold NaN?"
        )


def choose(candidates: Sequence[Candidate], margin: float) -> Verdict:
    """Return the learned merge if its select loss beats the best baseline's by `margin` paired standard errors.

    The best baseline is the one with the lowest select loss. Otherwise that baseline ships.
    """
    baseline = best_baseline(candidates)
    learned = [c for c in candidates if c.learned]
    if not learned:
        return Verdict(baseline, f"{baseline.name} has the lowest select loss")
    best = min(learned, key=lambda c: c.select.ranking_loss)
    gain = paired_difference(baseline.select, best.select)
    if gain.value > margin * gain.standard_error:
        return Verdict(
            best,
            f"{best.name} ships: its select loss is {gain.value:.4f} ± {gain.standard_error:.4f} lower than that of "
            f"{baseline.name}, more than the margin of {margin:g} paired se",
        )
    direction = "lower" if gain.value > 0 else "higher"
    return Verdict(
        baseline,
        f"{baseline.name} ships: the select loss of {best.name} is {abs(gain.value):.4f} ± {gain.standard_error:.4f} "
        f"{direction} than its own, and would have to be lower by more than {margin:g} paired se",
    )


def warnings(scorer: Scorer, soup: Soup, norms: Any, centre_norm: float, *, ordered: bool) -> list[str]:
    """Return early warnings about a soup whose members may share no base, or of snapshots that are far apart."""
    labels = soup.labels
    found = []
    distance = float((norms.square().sum(dim=0)).sqrt().max())
    if distance > 0.7 * centre_norm:
        far = f"as far from their average ({distance:.3g}) as it is from zero ({centre_norm:.3g})"
        found.append(
            f"some snapshots are {far}: leave out the first ones, or learn along few principal components (directions: "
            "pca, components: 5)"
            if ordered
            else f"the checkpoints are {far}: they may not share a base, and averages of such models are useless"
        )
    singles = [scorer(mixing.one_hot(k, labels)).ranking_loss for k in range(len(labels))]
    for label, loss in zip(labels, singles, strict=True):
        if loss == math.inf:
            found.append(f"{label}: its loss on the held-out data is not finite; leave it out")
    uniform = scorer(mixing.uniform(labels)).ranking_loss
    if uniform > max(singles):
        found.append(
            f"the uniform average (loss {uniform:.3f}) is worse than every checkpoint (worst {max(singles):.3f}): "
            "they may not share a base"
        )
    return found
