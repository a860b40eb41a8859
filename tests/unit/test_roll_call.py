"""Who is dead, and where it was, as one of several survivors finds it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from llara_dist.supervision import roll_call
from llara_dist.supervision.process_identity import this_process
from llara_dist.supervision.progress import Phase, Progress
from llara_dist.supervision.rank_status import KILLED, RankRecord, write_status

FILE, MEMORY = Progress(Phase.STARTING), Progress(Phase.VALIDATION, 5)
"""what a rank's status file said some seconds before it was killed; where it was then"""


def a_record(rank: int) -> RankRecord:
    return RankRecord(
        token="t",
        rank=rank,
        world_size=2,
        process=dataclasses.replace(this_process(), started=1 if rank else this_process().started),  # 1: it is gone
        heartbeat=3,
        interval_s=5.0,
        progress=FILE,
        changes=1,
        idle_s=0.0,
        in_collective=False,
        ended=None,
        written_at="2026-01-01T00:00:00+0000",
    )


def test_a_survivor_that_comes_second_finds_where_the_dead_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first takes the page away once its content is in the file, which the second has read before."""
    (tmp_path / "ranks").mkdir()
    for rank in (0, 1):
        write_status(tmp_path, a_record(rank))

    def read(token: str, rank: int) -> Progress | None:
        write_status(tmp_path, dataclasses.replace(a_record(rank), progress=MEMORY, ended=KILLED))
        return None

    monkeypatch.setattr(roll_call, "read_shared_place", read)
    diagnosis = roll_call.call_roll(tmp_path, a_record(0), silence_s=60.0)
    assert [(record.rank, record.progress) for record in diagnosis.dead] == [(1, MEMORY)]
