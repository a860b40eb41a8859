from itertools import permutations

import numpy as np
import pytest

from llara_dist.recommenders.ranking import Ranks, rank_targets, ranking_scores


def test_ranks_without_ties_are_the_usual_ones() -> None:
    scores = np.array([[0.1, 0.9, 0.5, 0.3], [0.1, 0.9, 0.5, 0.3]])
    ranks = rank_targets(scores, np.array([2, 1]))
    assert ranks.above.tolist() == [1, 0]
    assert ranks.tied.tolist() == [0, 0]
    result = ranking_scores(ranks, [1, 2], [1, 4])
    assert result["hr@1"] == 0.5
    assert result["hr@2"] == 1.0
    assert result["ndcg@1"] == 0.5
    assert result["ndcg@4"] == pytest.approx((1 + 1 / np.log2(3)) / 2)


def test_ties_are_the_expectation_over_every_order_of_the_equals() -> None:
    scores = np.array([0.5, 0.9, 0.5, 0.5, 0.1])
    ranks = rank_targets(scores[None], np.array([2]))
    places = []
    for order in permutations(range(5)):
        shuffled = scores[list(order)]
        ranked = np.argsort(-shuffled, kind="stable")
        places.append([order[index] for index in ranked].index(2))
    places = np.array(places)
    for k in (1, 2, 3, 4, 5):
        assert ranks.hits(k)[0] == pytest.approx((places < k).mean())
        assert ranks.gains(k)[0] == pytest.approx(np.where(places < k, 1 / np.log2(places + 2), 0).mean())
    assert ranks.gains()[0] == pytest.approx((1 / np.log2(places + 2)).mean())


def test_a_constant_scorer_gets_what_chance_gets() -> None:
    ranks = rank_targets(np.zeros((7, 20)), np.arange(7))
    assert ranks.hits(1) == pytest.approx(0.05)
    assert ranks.hits(10) == pytest.approx(0.5)


def test_nan_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        rank_targets(np.array([[0.0, np.nan]]), np.array([0]))


def test_gains_of_a_target_that_is_last_of_many() -> None:
    assert Ranks(np.array([99]), np.array([0])).gains(10)[0] == 0.0
    assert Ranks(np.array([99]), np.array([0])).gains()[0] == pytest.approx(1 / np.log2(101))
