"""Schedules, draws and learning rates: pure functions of the optimizer step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llara_dist.config import CurriculumConfig
from llara_dist.training.curriculum import SCHEDULES, Curriculum
from llara_dist.training.schedule import learning_rate


def curriculum(horizon: int = 100, seed: int = 0, **settings) -> Curriculum:
    return Curriculum(CurriculumConfig(**settings), horizon, seed)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "linear"}, [0.0, 0.5, 0.99]),
        ({"schedule": "two_stage", "switch": 0.5}, [0.0, 1.0, 1.0]),
        ({"schedule": "constant", "probability": 0.3}, [0.3, 0.3, 0.3]),
        ({"schedule": "cosine"}, [0.0, 0.5, 0.99975]),
        ({"schedule": "sqrt"}, [0.0, 0.70711, 0.99499]),
    ],
)
def test_probabilities(settings: dict, expected: list[float]) -> None:
    made = curriculum(**settings)
    assert [made.probability(step) for step in (0, 50, 99)] == pytest.approx(expected, abs=1e-5)


def test_p_reaches_the_end_of_the_run_not_of_the_epoch() -> None:
    made = curriculum(horizon=1000)
    shares = [made.draw(step, np.arange(2000, dtype=np.uint64)).mean() for step in (0, 250, 500, 750, 999)]
    assert shares == pytest.approx([0.0, 0.25, 0.5, 0.75, 0.999], abs=0.03)


def test_a_draw_depends_on_seed_step_and_key_alone() -> None:
    keys = np.arange(1000, dtype=np.uint64)
    whole = curriculum().draw(40, keys)
    halves = np.concatenate([curriculum().draw(40, keys[:500]), curriculum().draw(40, keys[500:])])
    assert np.array_equal(whole, halves)
    assert not np.array_equal(whole, curriculum(seed=1).draw(40, keys))
    assert not np.array_equal(whole, curriculum(schedule="constant", probability=0.4).draw(41, keys))


def test_learning_rate_warms_up_and_falls_to_the_floor() -> None:
    rates = [learning_rate(step, 200, 1.0, 0.05, 0.01) for step in range(200)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01)
    assert all(earlier < later for earlier, later in itertools.pairwise(rates[:11]))
    assert all(earlier > later for earlier, later in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("total", [1, 2, 3])
def test_learning_rate_of_the_shortest_runs_is_within_bounds(total: int) -> None:
    for step in range(total):
        assert 0.01 <= learning_rate(step, total, 1.0, 0.05, 0.01) <= 1.0


def test_every_schedule_of_the_config_exists_and_stays_a_probability() -> None:
    import typing

    names = typing.get_args(typing.get_type_hints(CurriculumConfig)["schedule"])
    assert set(names) == set(SCHEDULES)
    for name in names:
        made = curriculum(schedule=name)
        assert all(0.0 <= made.probability(step) <= 1.0 for step in range(100))


def test_reader_processes_can_hold_it() -> None:
    import pickle

    made = curriculum()
    keys = np.arange(10, dtype=np.uint64)
    assert np.array_equal(pickle.loads(pickle.dumps(made)).draw(50, keys), made.draw(50, keys))
