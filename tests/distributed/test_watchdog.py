"""A rank dies, fails or hangs: the others stop within the time limit and say which, where, with what, and why."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llara_dist.errors import EXIT_RANK_LOST
from llara_dist.supervision.rank_status import KILLED, STOPPED, read_statuses
from tests.distributed.faults import HANG_TIMEOUT_S, KEYS, STEP, Ended, run_with_fault

SAMPLES = "sample keys 100, 101, 102, 103, 104, 105, 106, 107, … (12 in all)"
assert tuple(range(100, 112)) == KEYS


def require_told(survivors: list[Ended], folder: Path, *parts: str) -> None:
    """Each survivor ended with 70 and named the rank; one of them said everything, as the report does."""
    for survivor in survivors:
        assert survivor.code == EXIT_RANK_LOST, survivor.said
        assert survivor.said.count("rank 2 of 3 on ") == 1, survivor.said
    (report,) = (folder / "run" / "ranks").glob("lost-*.txt")
    text = report.read_text()
    first = text.splitlines()[0]
    for part in ("rank 2 of 3 on ", "(pid ", f"step {STEP}, ", SAMPLES, *parts):
        assert part in first, first
    assert sum(text.rstrip() in survivor.said for survivor in survivors) == 1
    stacks = (folder / "run" / "ranks" / "stacks-00000.txt").read_text()
    assert "faults.py" in stacks
    assert "all_reduce" in stacks
    assert "reduce: ranks 0–1" in text


@pytest.mark.parametrize("fault", ["kill", "kill, with rank 0 elsewhere"])
def test_a_killed_rank(fault: str, tmp_path: Path) -> None:
    *survivors, killed = run_with_fault(fault, tmp_path)
    assert killed.code == -9
    require_told(survivors, tmp_path, "is dead: ", "micro-batch 0, forward")
    assert [record.ended for record in read_statuses(tmp_path / "run")] == [STOPPED, STOPPED, KILLED]


def test_a_killed_rank_of_which_its_host_tells_nothing(tmp_path: Path) -> None:
    *survivors, _ = run_with_fault("kill, alone on a host", tmp_path)
    for survivor in survivors:
        assert survivor.code == EXIT_RANK_LOST
        assert "rank 2 of 3 on " in survivor.said
        assert "is silent: " in survivor.said
    assert [record.ended for record in read_statuses(tmp_path / "run")] == [STOPPED, STOPPED, None]


def test_a_rank_that_dies_where_no_collective_and_no_limit_tells(tmp_path: Path) -> None:
    *survivors, _ = run_with_fault("die while all validate", tmp_path)
    for rank, survivor in enumerate(survivors):
        assert survivor.code == EXIT_RANK_LOST
        assert "rank 2 of 3 on " in survivor.said
        assert f"is dead: its process ended without a word, as when it is killed; last seen in step {STEP}, val" in (
            survivor.said
        )
        assert "in run_steps" in (tmp_path / "run" / "ranks" / f"stacks-{rank:05d}.txt").read_text()


def test_a_process_alone_that_hangs(tmp_path: Path) -> None:
    (hung,) = run_with_fault("spin", tmp_path, size=1)
    assert hung.code == EXIT_RANK_LOST
    assert "rank 0 of 1 on " in hung.said
    told = re.search(rf"hangs: no progress for (\d+) s in step {STEP}, data, {re.escape(SAMPLES)}", hung.said)
    assert told, hung.said
    assert int(told[1]) >= HANG_TIMEOUT_S
    assert "in fault_at" in hung.said


@pytest.mark.long
def test_a_suspended_rank(tmp_path: Path) -> None:
    *survivors, _ = run_with_fault("suspend", tmp_path)
    require_told(survivors, tmp_path, "is silent: ", "micro-batch 0, forward")


def test_a_rank_that_hangs_in_data(tmp_path: Path) -> None:
    *survivors, hung = run_with_fault("spin", tmp_path)
    require_told([*survivors, hung], tmp_path, "hangs: no progress for ", "data")
    stacks = (tmp_path / "run" / "ranks" / "stacks-00002.txt").read_text()
    assert "in fault_at" in stacks
    assert any("stacks of rank 2:" in each.said and "in fault_at" in each.said for each in [*survivors, hung])


@pytest.mark.long
def test_a_rank_that_hangs_in_the_phase_in_which_the_others_wait(tmp_path: Path) -> None:
    ranks = run_with_fault("spin beside a collective", tmp_path)
    require_told(ranks, tmp_path, "hangs: no progress for ", "reduce")


def test_a_rank_that_fails_keeps_its_own_error(tmp_path: Path) -> None:
    *survivors, failed = run_with_fault("fail", tmp_path)
    require_told(survivors, tmp_path, "failed: ValueError: shard 7 is damaged", "micro-batch 0, forward")
    assert failed.code == 1
    assert "ValueError: shard 7 is damaged" in failed.said


def test_an_error_of_all_ranks_stays_that_error(tmp_path: Path) -> None:
    for ended in run_with_fault("fail everywhere", tmp_path):
        assert ended.code == 1
        assert ended.said.rstrip().endswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
        assert "rank 2 of 3" not in ended.said
    assert not list((tmp_path / "run" / "ranks").glob("lost-*"))


@pytest.mark.long
def test_a_rank_that_hangs_where_there_is_no_limit_is_told_by_the_others(tmp_path: Path) -> None:
    ranks = run_with_fault("validate for ever", tmp_path)
    require_told(ranks, tmp_path, "hangs: no progress for ", "validation")
    assert "in fault_at" in (tmp_path / "run" / "ranks" / "stacks-00002.txt").read_text()


@pytest.mark.long
def test_a_rank_that_lets_no_other_thread_run(tmp_path: Path) -> None:
    *survivors, stuck = run_with_fault("hold the interpreter", tmp_path)
    require_told(survivors, tmp_path, "is silent: ", "micro-batch 0, backward")
    assert stuck.code == 1
    assert "in fault_at" in stuck.said
