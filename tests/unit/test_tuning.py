"""Ranks find the run's checkpoint before they know of each other: what they found is compared under the lock."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llara_dist import tuning
from llara_dist.config import RunConfig
from llara_dist.distributed import World
from llara_dist.errors import InputError


def inputs_at(step: int | None) -> Any:
    return SimpleNamespace(checkpoint=None if step is None else SimpleNamespace(step=step))


def as_two_ranks(monkeypatch: pytest.MonkeyPatch, others: list[Any], reopened: int | None) -> list[str]:
    """This process is rank 0; `others` are what rank 1 gives to one collective after the other."""
    calls: list[str] = []
    given = iter(others)
    monkeypatch.setattr(tuning.distributed, "gather_objects", lambda value: [value, next(given)])

    def open_inputs(config: RunConfig, world: World) -> Any:
        calls.append("opened")
        return inputs_at(reopened)

    monkeypatch.setattr(tuning, "open_inputs", open_inputs)
    return calls


def run_with_checkpoint(tmp_path: Path, step: int, resume: Any = "auto") -> RunConfig:
    folder = tmp_path / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "complete.json").touch()
    return RunConfig(out=tmp_path, resume=resume)


def test_ranks_that_agree_go_on_with_what_they_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = as_two_ranks(monkeypatch, [(30, 30)], reopened=30)
    before = inputs_at(30)
    assert tuning.reopened(run_with_checkpoint(tmp_path, 30), before, World(0, 0, 2)) is before
    assert calls == []


@pytest.mark.parametrize(("mine", "theirs"), [(20, 30), (30, 20), (30, None), (None, None)])
def test_who_found_another_checkpoint_than_lies_there_opens_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: int | None, theirs: int | None
) -> None:
    calls = as_two_ranks(monkeypatch, [(theirs, 30), 30], reopened=30)
    found = tuning.reopened(run_with_checkpoint(tmp_path, 30), inputs_at(mine), World(0, 0, 2))
    assert tuning.step_of(found) == 30
    assert calls == ["opened"]


def test_ranks_that_still_see_different_checkpoints_do_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_two_ranks(monkeypatch, [(20, 20), 20], reopened=30)
    with pytest.raises(InputError, match=r"different newest checkpoints, of steps \['20', '30'\].*start again"):
        tuning.reopened(run_with_checkpoint(tmp_path, 30), inputs_at(30), World(0, 0, 2))


def test_a_new_run_finds_out_that_another_one_came_before_it_got_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_two_ranks(monkeypatch, [None], reopened=None)
    with pytest.raises(InputError, match="holds a run already"):
        tuning.reopened(run_with_checkpoint(tmp_path, 30, resume="no"), inputs_at(None), World(0, 0, 2))
