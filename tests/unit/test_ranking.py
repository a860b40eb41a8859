from itertools import permutations

import numpy as np
import pytest

from llara_dist.recommenders.ranking import Ranks, bootstrap_interval, rank_targets, ranking_scores


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


def test_bootstrap_interval_covers_the_mean_at_its_stated_rate() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for trial in range(300):
        values = (generator.random(200) < 0.3).astype(float)
        low, high = bootstrap_interval(values, resamples=500, seed=trial)
        inside += low <= 0.3 <= high
    assert 0.90 <= inside / 300 <= 0.99


def test_bootstrap_interval_is_seeded_and_agrees_with_the_normal_one() -> None:
    values = np.repeat([0.0, 1.0], [300, 100])
    interval = bootstrap_interval(values)
    assert interval == bootstrap_interval(values)
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert interval == pytest.approx((0.25 - half, 0.25 + half), abs=0.006)
    continuous = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(continuous, resamples=2000)
    half = 1.96 * continuous.std() / 20
    assert (low, high) == pytest.approx((continuous.mean() - half, continuous.mean() + half), abs=0.02)
    with pytest.raises(ValueError, match="no rows"):
        bootstrap_interval(np.zeros(0))


def test_gains_of_a_target_that_is_last_of_many() -> None:
    assert Ranks(np.array([99]), np.array([0])).gains(10)[0] == 0.0
    assert Ranks(np.array([99]), np.array([0])).gains()[0] == pytest.approx(1 / np.log2(101))
