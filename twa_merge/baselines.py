"""The merges that need scores but no gradient: best single and greedy soup.

Both take `score: MixingWeights -> float`, lower is better, so they know neither model nor data.
"""

from __future__ import annotations

from collections.abc import Callable

from twa_merge import mixing
from twa_merge.mixing import MixingWeights

Score = Callable[[MixingWeights], float]


def best_single(checkpoints: tuple[str, ...], score: Score) -> MixingWeights:
    """Return the checkpoint with the lowest score, the first of equals."""
    candidates = [mixing.one_hot(k, checkpoints) for k in range(len(checkpoints))]
    return min(candidates, key=score)


def greedy_soup(checkpoints: tuple[str, ...], score: Score) -> MixingWeights:
    """Return the greedy soup (Wortsman et al. 2022, recipe 1).

    Checkpoints are tried from best to worst; each stays in the average if it does not raise the score.
    """
    order = sorted(range(len(checkpoints)), key=lambda k: score(mixing.one_hot(k, checkpoints)))
    chosen = order[:1]
    best = score(mixing.subset(chosen, checkpoints))
    for k in order[1:]:
        tried = score(mixing.subset([*chosen, k], checkpoints))
        if tried <= best:
            chosen, best = [*chosen, k], tried
    return mixing.subset(chosen, checkpoints)
