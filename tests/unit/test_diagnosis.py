"""Who is to blame, from what the ranks' files say."""

from __future__ import annotations

import dataclasses

import pytest

from llara_dist.supervision.diagnosis import Diagnosis, Watched, diagnose, ranges
from llara_dist.supervision.process_identity import this_process
from llara_dist.supervision.progress import Phase, Progress
from llara_dist.supervision.rank_status import KILLED, STOPPED, RankRecord

WAITS = Progress(Phase.REDUCE, 17, 3)


def a_rank(rank: int, progress: Progress = WAITS, ended: str | None = None, idle_s: float = 900.0) -> RankRecord:
    process = dataclasses.replace(this_process(), host=f"node-{rank // 2}", pid=100 + rank)
    return RankRecord("t", rank, 4, process, 9, 5.0, progress, 50, idle_s, False, ended, "2026-01-01T00:00:00+0000")


def seen(*records: RankRecord, still: tuple[int, ...] = (), running: dict[int, bool] | None = None) -> Diagnosis:
    """The diagnosis of ranks whose heartbeats moved, but for those in `still`."""
    known = running or {}
    return diagnose({r.rank: Watched(r, r.rank not in still, known.get(r.rank)) for r in records}, 4, 15.0)


def text(diagnosis: Diagnosis) -> str:
    return "\n".join(diagnosis.lines("OUT/ranks/stacks-*.txt"))


def ranks(records: tuple[RankRecord, ...]) -> list[int]:
    return [record.rank for record in records]


def test_the_rank_behind_the_others_hangs() -> None:
    hangs = a_rank(3, Progress(Phase.BACKWARD, 17, 2, (5, 9), 12), idle_s=905.2)
    found = seen(a_rank(0), a_rank(1), a_rank(2), hangs)
    assert ranks(found.behind) == [3]
    assert ranks(found.waiting) == [0, 1, 2]
    assert not found.is_rank_gone
    assert text(found).splitlines() == [
        "rank 3 of 4 on node-1 (pid 103) hangs: no progress for 905 s in step 17, micro-batch 2, backward, "
        "sample keys 5, 9, … (12 in all)",
        "in step 17, micro-batch 3, reduce: ranks 0–2",
        "stacks: OUT/ranks/stacks-*.txt",
    ]


@pytest.mark.parametrize(
    "behind",
    [
        Progress(Phase.DATA, 17),
        Progress(Phase.FORWARD, 17, 3),
        Progress(Phase.STEP, 16),
        Progress(Phase.CHECKPOINT, 16),
        Progress(Phase.LOADING),
    ],
)
def test_every_earlier_place_is_behind(behind: Progress) -> None:
    found = seen(a_rank(0), a_rank(1, behind), a_rank(2), a_rank(3))
    assert ranks(found.behind) == [1]


def test_several_hang() -> None:
    data = Progress(Phase.DATA, 17)
    found = seen(a_rank(0, data), a_rank(1), a_rank(2, data), a_rank(3, Progress(Phase.FORWARD, 17)))
    assert ranks(found.behind) == [0, 2]
    assert ranks(found.waiting) == [1, 3]


def test_nobody_is_behind_when_all_stand_at_the_same_place() -> None:
    found = seen(*map(a_rank, range(4)))
    assert found.behind == ()
    assert "all ranks stand in step 17, micro-batch 3, reduce, none is behind" in text(found)


def test_who_computes_at_a_place_where_the_others_wait_holds_them_up() -> None:
    waiting = [dataclasses.replace(a_rank(rank), in_collective=True) for rank in (0, 1, 3)]
    found = seen(*waiting, a_rank(2))
    assert ranks(found.behind) == [2]
    assert ranks(found.waiting) == [0, 1, 3]
    assert seen(*(dataclasses.replace(a_rank(rank), in_collective=True) for rank in range(4))).behind == ()


def test_a_rank_alone_is_the_one_that_hangs() -> None:
    found = diagnose({0: Watched(a_rank(0), True, True)}, 1, 0.0)
    assert ranks(found.behind) == [0]


def test_a_silent_rank_is_to_blame_whoever_is_behind() -> None:
    found = seen(a_rank(0, Progress(Phase.DATA, 17)), a_rank(1), a_rank(2), a_rank(3), still=(2,))
    assert ranks(found.silent) == [2]
    assert found.is_rank_gone
    lines = text(found).splitlines()
    assert lines[0].startswith("rank 2 of 4 on node-1 (pid 102) is silent: no sign of life while watched for 15.0 s")
    assert "in step 17, data: ranks 0" in lines
    assert "in step 17, micro-batch 3, reduce: ranks 1, 3" in lines
    assert "hangs" not in text(found)


def test_dead_is_more_than_silent() -> None:
    found = seen(*map(a_rank, range(4)), still=(1, 2), running={0: True, 1: False, 2: True, 3: True})
    assert ranks(found.dead) == [1]
    assert ranks(found.silent) == [2]
    assert ranks(seen(a_rank(0), a_rank(1), a_rank(2), a_rank(3, ended=KILLED)).dead) == [3]


def test_a_heartbeat_that_moved_before_the_process_died_does_not_save_it() -> None:
    assert ranks(seen(*map(a_rank, range(4)), running={1: False}).dead) == [1]


def test_a_rank_that_failed_says_why_and_its_victims_are_not_blamed() -> None:
    found = seen(a_rank(0), a_rank(1, ended="OutOfMemoryError: 3 GiB"), a_rank(2, ended=STOPPED), a_rank(3, ended=""))
    assert ranks(found.failed) == [1]
    assert ranks(found.finished) == [3]
    assert (found.dead, found.silent, found.missing) == ((), (), ())
    assert text(found).startswith("rank 1 of 4 on node-0 (pid 101) failed: OutOfMemoryError: 3 GiB; last seen in step")


def test_a_rank_without_a_file_is_missing_and_not_gone() -> None:
    found = seen(a_rank(0), a_rank(2))
    assert found.missing == (1, 3)
    assert not found.is_rank_gone
    assert "ranks that never gave a sign of life: 1, 3" in text(found)


def test_many_that_hang_are_named_in_brief() -> None:
    data = Progress(Phase.DATA, 17)
    records = {rank: Watched(a_rank(rank, data if rank < 1000 else WAITS), True, None) for rank in range(1024)}
    lines = diagnose(records, 1024, 15.0).lines("stacks")
    assert sum("hangs" in line for line in lines) == 8
    assert "so do ranks 8–999" in lines
    assert "in step 17, micro-batch 3, reduce: ranks 1000–1023" in lines


@pytest.mark.parametrize(("given", "said"), [([3, 0, 1, 2, 7, 9, 8], "0–3, 7–9"), ([4], "4"), ([], "")])
def test_ranges(given: list[int], said: str) -> None:
    assert ranges(given) == said
