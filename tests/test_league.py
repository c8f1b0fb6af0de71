from types import SimpleNamespace

import numpy as np
import pytest
import torch

from twa_merge import mixing
from twa_merge.baselines import best_single, greedy_soup
from twa_merge.errors import UserError
from twa_merge.evaluation import Evaluation
from twa_merge.league import Candidate, choose, last_counts, require_finite, warnings
from twa_merge.training import Learned, best_evaluation

NAMES = ("a", "b", "c", "d")


def quadratic(target):
    """A score whose best merge is known: the squared distance of the weights from `target`."""
    return lambda weights: float((weights.table[0] - weights.table.new_tensor(target)).square().sum())


def test_best_single_is_the_lowest():
    assert best_single(NAMES, quadratic([0, 0, 1, 0])).one_hot_column() == 2


def test_greedy_keeps_what_does_not_raise_the_score():
    weights = greedy_soup(NAMES, quadratic([0.55, 0.45, 0, 0]))
    assert weights.table.tolist() == [[0.5, 0.5, 0, 0]]


def test_greedy_is_never_worse_than_the_best_single():
    rng = np.random.default_rng(0)
    for _ in range(20):
        score = quadratic(rng.normal(size=4).tolist())
        assert score(greedy_soup(NAMES, score)) <= score(best_single(NAMES, score))


def candidate(name, losses, **options):
    losses = np.asarray(losses, dtype=float)
    evaluation = Evaluation(losses, np.ones_like(losses), [], [], ())
    return Candidate(name, mixing.uniform(NAMES), evaluation, **options)


def test_a_learned_merge_ships_only_past_the_margin():
    rng = np.random.default_rng(1)
    base = rng.normal(1.0, 0.5, 400)
    greedy, worse = candidate("greedy", base), candidate("uniform", base + 0.5)
    clear = candidate("TWA", base - 0.1 + rng.normal(0, 0.1, 400), learned=True)
    unclear = candidate("TWA", base - 0.001 + rng.normal(0, 0.5, 400), learned=True)
    assert choose([greedy, worse, clear], 1.0).winner is clear
    verdict = choose([greedy, worse, unclear], 1.0)
    assert verdict.winner is greedy and "greedy ships" in verdict.reason


def test_what_was_chosen_with_the_select_part_in_view_never_ships():
    peeked = candidate("greedy (fit + select)", np.zeros(50), optimistic=True)
    honest = candidate("greedy", np.ones(50))
    assert choose([peeked, honest], 1.0).winner is honest
    nothing = candidate("greedy", np.full(50, np.nan))
    with pytest.raises(UserError, match="no candidate has a finite loss"):
        require_finite([peeked, nothing])
    require_finite([peeked, nothing, honest])


def run(*losses):
    import torch

    return Learned(torch.zeros(len(losses), 1, 2), [{"select_loss": loss, "step": i} for i, loss in enumerate(losses)])


def test_all_folds_share_one_step():
    assert best_evaluation([run(3, 1, 2), run(3, 2, 0)], [1, 1]) == 2
    assert best_evaluation([run(3, 1, 2), run(3, 2, 0)], [10, 1]) == 1
    assert best_evaluation([run(3, 1), run(3, 2, 0)], [1, 1]) == 1  # only steps that all have reached


@pytest.mark.parametrize("n, expected", [(2, [1, 2]), (5, [1, 2, 3, 4, 5]), (20, [1, 2, 3, 4, 6, 8, 12, 16, 20])])
def test_last_k_is_tried_at_steps_that_grow(n, expected):
    assert last_counts(n) == expected


@pytest.mark.parametrize("ordered, advice", [(False, "may not share a base"), (True, "directions: pca, components: 5")])
def test_checkpoints_far_apart_are_warned_of(ordered, advice):
    soup, norms = SimpleNamespace(labels=("a", "b")), torch.ones(1, 2)
    found = warnings(lambda weights: SimpleNamespace(ranking_loss=1.0), soup, norms, 1.0, ordered=ordered)
    assert len(found) == 1 and advice in found[0]
    assert not warnings(lambda weights: SimpleNamespace(ranking_loss=1.0), soup, norms, 2.0, ordered=ordered)
