"""Ranks find the run's checkpoint before they know of each other: what they found is compared under the lock."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llara_dist import tuning
from llara_dist.config import RunConfig
from llara_dist.distributed import Job, World, read_job
from llara_dist.errors import InputError
from llara_dist.model.kernels import Kernels
from llara_dist.supervision.early_end import early_end_told, early_paths, read_early_ends
from llara_dist.supervision.rank_logs import RankLog
from llara_dist.supervision.rank_status import read_statuses


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


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InputError("rank 1 has no GPU", everywhere=False), (2, False, "rank 1 has no GPU")),
        (InputError("no shards"), (2, True, "no shards")),
        (OSError(5, "Input/output error"), (2, False, "OSError: [Errno 5] Input/output error")),
        (ImportError("libcuda.so:\nnot found"), (1, False, "ImportError: libcuda.so: not found")),
    ],
)
def test_a_rank_that_fails_before_the_others_know_of_it_leaves_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: tuple[int, bool, str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "a/b")

    def fail(config: RunConfig, world: World) -> None:
        raise error

    monkeypatch.setattr(tuning, "open_inputs", fail)
    config, world = RunConfig(out=tmp_path / "new" / "run"), World(1, 1, 2)
    with pytest.raises(type(error)) as caught:
        tuning.tune(config, False, False, world, RankLog(world))
    assert caught.value is error
    (end,) = read_early_ends(early_paths(config.out, read_job()))
    assert (end.rank, end.world_size) == (1, 2)
    assert (end.code, end.everywhere, end.message) == expected
    assert early_paths(config.out, Job("7@a/b", 1)) == set()
    assert read_statuses(config.out) == []


def test_who_cannot_join_the_others_blames_no_node(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError), early_end_told(tmp_path, World(1, 1, 2), Job("7"), joining=True):
        raise TimeoutError("no answer")
    (end,) = read_early_ends(early_paths(tmp_path, Job("7")))
    assert end.everywhere


@pytest.mark.parametrize(("world", "job"), [(World(), Job("7")), (World(1, 1, 2), Job())])
def test_who_keeps_nobody_waiting_or_has_no_batch_step_leaves_nothing(tmp_path: Path, world: World, job: Job) -> None:
    with pytest.raises(OSError, match="disk"), early_end_told(tmp_path / "run", world, job):
        raise OSError("disk")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_does_not_hide_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="why"), early_end_told(tmp_path / "file", World(1, 1, 2), Job("7")):
        raise InputError("why")


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


def test_ranks_that_would_compute_with_other_kernels_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Kernels("flash2", "triton", "fused", "liger", "answers", False, reasons=(("attention", "flash3: none"),))
    other = dataclasses.replace(here, attention="sdpa", reasons=())
    ranks = [here, here, other, here]
    monkeypatch.setattr(tuning.distributed, "gather_objects", lambda value: [value, *(k.values() for k in ranks[1:])])
    with pytest.raises(InputError, match=r"^kernels.attention comes to flash2 on ranks 0–1, 3, sdpa on ranks 2: "):
        tuning.require_same_kernels(here)
    ranks[2] = dataclasses.replace(here, reasons=())
    tuning.require_same_kernels(here)


def test_a_new_run_finds_out_that_another_one_came_before_it_got_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_two_ranks(monkeypatch, [None], reopened=None)
    with pytest.raises(InputError, match="holds a run already"):
        tuning.reopened(run_with_checkpoint(tmp_path, 30, resume="no"), inputs_at(None), World(0, 0, 2))
