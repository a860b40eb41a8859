"""Checkpoint and validation after a step: order, what is owed, what is saved twice; with a run that only records."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llara_dist.config import ValidationConfig
from llara_dist.training.between_steps import StoppedError, conclude, validate
from llara_dist.training.scores import ValidationScores
from llara_dist.training.validations import Validations

MEASURE = {"generation": True, "rows": 0, "max_new_tokens": 64}


class Told:
    """A validator that finds what it is told, None = a stop was asked for in the middle."""

    def __init__(self, *hit_ratios: float | None, measure: dict[str, Any] = MEASURE) -> None:
        self.left, self.measure = list(hit_ratios), measure

    def __call__(self, engine: Any, step: int) -> ValidationScores | None:
        hit_ratio = self.left.pop(0)
        return None if hit_ratio is None else ValidationScores(step, hit_ratio, 1.0)


def make_run(validator: Told | None, patience: int = 0, state: dict[str, Any] | None = None) -> Any:
    settings = ValidationConfig(every_steps=2, patience=patience)
    run = SimpleNamespace(
        total_steps=8,
        engine=SimpleNamespace(phases=SimpleNamespace(enter=lambda *_: None)),
        validations=Validations(validator, settings, 8, state or {}),
        checkpoint_due=lambda done: done % 4 == 0,
        saves=[],
    )

    def save(done: int, best: ValidationScores | None = None, required: bool = False) -> SimpleNamespace:
        run.saves.append((done, best is not None, required, run.validations.owed_after))
        return SimpleNamespace(blocked_s=1.0)

    run.save = save
    return run


LOG: Any = SimpleNamespace(write_validation=lambda *_: None)


def test_a_checkpoint_that_is_due_is_written_before_the_validation_and_owes_it() -> None:
    run = make_run(Told(0.5, 0.4, 0.6, 0.1))
    assert [conclude(run, LOG, done) for done in range(1, 9)] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert run.saves == [(2, True, False, None), (4, False, False, 4), (6, True, False, None), (8, False, False, None)]


def test_a_stop_in_the_middle_of_a_validation_saves_and_owes_it() -> None:
    run = make_run(Told(0.5, None))
    conclude(run, LOG, 2)
    with pytest.raises(StoppedError) as stopped:
        conclude(run, LOG, 4)
    assert stopped.value.done == 4
    assert run.saves[1:] == [(4, False, False, 4), (4, False, True, 4)]
    resumed = make_run(Told(0.7), state=run.validations.to_dict())
    assert resumed.validations.owes(4)
    assert not resumed.validations.owes(6)
    validate(resumed, LOG, 4)
    assert resumed.saves == [(4, True, False, None)]


def test_patience_ends_the_run_with_a_checkpoint_that_must_be_written() -> None:
    run = make_run(Told(0.5, 0.4, 0.3), patience=2)
    for done in (2, 4, 6):
        conclude(run, LOG, done)
    assert run.validations.exhausted
    assert run.saves[-1] == (6, False, True, None)


def test_scores_of_another_measure_are_not_compared() -> None:
    run = make_run(Told(0.5, 0.4), patience=3)
    for done in (2, 4):
        conclude(run, LOG, done)
    state = run.validations.to_dict()
    same = make_run(Told(), patience=3, state=state).validations
    assert (same.patience.since_best, same.measured_anew) == (1, False)
    ranked = make_run(Told(measure=MEASURE | {"generation": False}), patience=3, state=state).validations
    assert ranked.measured_anew
    assert (ranked.patience.best, ranked.patience.since_best) == (None, 0)


def test_without_a_validator_nothing_is_owed() -> None:
    run = make_run(None, state={"owed_after": 4})
    assert not run.validations.owes(4)
    conclude(run, LOG, 4)
    assert run.saves == [(4, False, False, None)]
