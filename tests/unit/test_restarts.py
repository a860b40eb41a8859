"""Two restarts in a row without a step done end the requeueing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llara_dist.distributed import Job
from llara_dist.supervision.restarts import STARTS, Start, idle_restarts, may_requeue, read_starts, record_start

JOB = Job("7")


def starts(*first_steps: int, job: str = "7") -> list[Start]:
    return [Start(job, restart, step, "") for restart, step in enumerate(first_steps)]


@pytest.mark.parametrize(
    ("first_steps", "done", "idle"),
    [
        ((0,), 0, 0),  # a first start is no restart
        ((0,), 9, 0),
        ((0, 0), 0, 1),
        ((0, 0, 0), 0, 2),
        ((0, 0, 0), 4, 0),  # it got on after all
        ((0, 9, 9), 9, 2),
        ((0, 9, 9, 20), 20, 1),
        ((0, 0, 0, 9), 9, 1),
        ((0, 9, 0, 0), 0, 2),  # begun anew with --resume no
        ((), 0, 0),
    ],
)
def test_restarts_that_got_no_further(first_steps: tuple[int, ...], done: int, idle: int) -> None:
    assert idle_restarts(starts(*first_steps), done) == idle


def test_a_job_submitted_anew_may_try_again() -> None:
    assert idle_restarts([*starts(5, 5, 5), *starts(5, job="8")], 5) == 0
    assert idle_restarts([*starts(5, 5, 5), *starts(5, 5, job="8")], 5) == 1


@given(st.lists(st.integers(0, 2), min_size=1, max_size=8), st.integers(1, 5))
def test_progress_always_allows_another_start(steps: list[int], more: int) -> None:
    assert idle_restarts(starts(*steps), steps[-1] + more) == 0


def test_the_third_idle_start_is_the_last(tmp_path: Path) -> None:
    allowed = []
    for restart in range(3):
        record_start(tmp_path, Job("7", restart), 40)
        allowed.append(may_requeue(tmp_path, 40))
    assert allowed == [True, True, False]
    assert may_requeue(tmp_path, 41)
    assert [start.restart for start in read_starts(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("torn", ['{"job": "7", "resta', "null\n", '{"job": "7"}\n', "\xff\n"])
def test_a_torn_line_costs_only_itself(tmp_path: Path, torn: str) -> None:
    record_start(tmp_path, JOB, 1)
    with open(tmp_path / STARTS, "ab") as file:
        file.write(torn.encode("latin-1"))
    record_start(tmp_path, JOB, 2)
    assert [start.first_step for start in read_starts(tmp_path)] == [1, 2]


def test_how_rows_were_shared_out_is_read_back(tmp_path: Path) -> None:
    (tmp_path / STARTS).write_text('{"job": "7", "restart": 0, "first_step": 3, "time": "then"}\n')
    record_start(tmp_path, JOB, 5, (8, 4), 4096, {"lora": "peft", "compile": False})
    older, found = read_starts(tmp_path)
    assert older == Start("7", 0, 3, "then")
    assert (found.nodes, found.max_tokens_per_microbatch) == ((8, 4), 4096)
    assert (older.kernels, found.kernels) == ({}, {"lora": "peft", "compile": False})
