"""What a step cost a rank, from its phases alone."""

from __future__ import annotations

import pytest

from llara_dist.supervision.progress import Phase
from llara_dist.supervision.step_clock import StepClock, StepCost


def a_step(clock: StepClock, begin: float, wait: float) -> float:
    """Two micro-batches of 3 and 4 samples; returns when it ended."""
    phases = [(Phase.DATA, wait, 0), (Phase.FORWARD, 1, 3), (Phase.BACKWARD, 2, 3), (Phase.FORWARD, 1, 4)]
    phases += [(Phase.BACKWARD, 2, 4), (Phase.REDUCE, 0.5, 4), (Phase.STEP, 0.25, 4)]
    for phase, seconds, samples in phases:
        clock.enter(phase, begin, samples)
        begin += seconds
    return begin


def test_phases_of_a_step_are_added_up_and_what_lies_between_steps_is_not() -> None:
    clock = StepClock()
    clock.enter(Phase.LOADING, 0.0, 0)
    now = a_step(clock, 100.0, wait=0.5)
    assert clock.cost is None
    clock.enter(Phase.VALIDATION, now, 0)
    assert clock.cost == StepCost(1, 0.5, 6.0, 0.75, 7.0)
    assert clock.cost.samples_per_s == pytest.approx(7 / 7.25)
    now = a_step(clock, now + 1000.0, wait=1.5)
    clock.enter(Phase.DATA, now, 0)
    assert clock.cost == StepCost(2, 1.0, 6.0, 0.75, 7.0)


def test_the_newest_steps_weigh_most() -> None:
    clock = StepClock()
    now = 0.0
    for _ in range(100):
        now = a_step(clock, now, wait=0.0)
    for _ in range(10):
        now = a_step(clock, now, wait=1.0)
    clock.enter(Phase.DATA, now, 0)
    assert clock.cost is not None
    assert clock.cost.wait_s == pytest.approx(1 - 0.9**10)
