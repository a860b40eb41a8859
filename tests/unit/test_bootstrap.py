import numpy as np
import pytest

from llara_dist.recommenders.bootstrap import bootstrap_interval, paired_difference


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


def test_a_paired_interval_is_narrower_where_the_two_systems_agree() -> None:
    generator = np.random.default_rng(0)
    hard = generator.random(500)
    first = (hard < 0.5).astype(float)
    second = np.where(generator.random(500) < 0.03, 1 - first, first)
    difference, low, high = paired_difference(first, second)
    assert difference == pytest.approx(first.mean() - second.mean())
    assert low <= difference <= high
    alone = bootstrap_interval(first)
    assert high - low < 0.5 * (alone[1] - alone[0])
    assert paired_difference(first, first) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="500 and 3 rows"):
        paired_difference(first, first[:3])
