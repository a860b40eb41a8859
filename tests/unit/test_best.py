"""Which checkpoint is the best, and that best.json always leads to it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llara_dist.errors import InputError
from llara_dist.training.checkpoints.best import read_best, write_best
from llara_dist.training.checkpoints.trained import find_checkpoint
from llara_dist.training.scores import ValidationScores, is_better
from tests.unit.checkpoints import write_checkpoint

scores = st.builds(
    ValidationScores,
    st.integers(0, 99),
    st.sampled_from([0.0, 0.25, 0.5, math.nan]),
    st.sampled_from([0.5, 1.0, math.inf, math.nan]),
)


def test_hit_ratio_first_then_loss_then_the_earlier() -> None:
    best = ValidationScores(step=10, hit_ratio=0.40, loss=1.5)
    assert is_better(best, None)
    assert is_better(ValidationScores(20, 0.41, 9.0), best)
    assert not is_better(ValidationScores(20, 0.39, 0.1), best)
    assert is_better(ValidationScores(20, 0.40, 1.4), best)
    assert not is_better(ValidationScores(20, 0.40, 1.6), best)
    assert not is_better(ValidationScores(20, 0.40, 1.5), best)


def test_what_is_not_a_number_is_worse_than_any_number() -> None:
    assert not is_better(ValidationScores(2, math.nan, 0.1), ValidationScores(1, 0.0, 9.0))
    assert is_better(ValidationScores(2, 0.0, 9.0), ValidationScores(1, math.nan, 0.1))
    assert not is_better(ValidationScores(2, 0.5, math.nan), ValidationScores(1, 0.5, 9.0))


@given(scores, scores, scores)
def test_better_is_a_strict_order(one: ValidationScores, two: ValidationScores, three: ValidationScores) -> None:
    assert not is_better(one, one)
    assert not (is_better(one, two) and is_better(two, one))
    if is_better(one, two) and is_better(two, three):
        assert is_better(one, three)


def test_the_best_is_found_by_the_runs_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (10, 20, 30):
        write_checkpoint(folder, step)
    write_best(folder, ValidationScores(20, 0.5, 1.25))
    assert read_best(folder) == ValidationScores(20, 0.5, 1.25)
    assert find_checkpoint(tmp_path, "best").step == 20
    assert find_checkpoint(tmp_path, "last").step == 30
    assert find_checkpoint(folder / "step-00000010").step == 10


def test_a_best_that_cannot_be_had_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with pytest.raises(InputError, match=r"holds no complete checkpoint"):
        find_checkpoint(tmp_path, "best")
    path = write_checkpoint(folder, 10)
    with pytest.raises(InputError, match=r"did not validate \(validation.every_steps\); use --checkpoint last"):
        find_checkpoint(tmp_path, "best")
    with pytest.raises(InputError, match=r"is one checkpoint already; give the run's folder"):
        find_checkpoint(path, "best")
    write_best(folder, ValidationScores(5, 0.5, 1.0))
    with pytest.raises(InputError, match=r"step-00000005.*not found.*names it as the best: use --checkpoint last"):
        find_checkpoint(tmp_path, "best")
    (folder / "best.json").write_text('{"step": 10}')
    with pytest.raises(InputError, match=r"best.json: no step, hit_ratio and loss"):
        find_checkpoint(tmp_path, "best")
