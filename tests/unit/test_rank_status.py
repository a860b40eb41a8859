"""What a rank says of itself, in memory and in its file."""

from __future__ import annotations

import dataclasses
import json
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llara_dist.supervision import shared_place
from llara_dist.supervision.process_identity import this_process
from llara_dist.supervision.progress import KEYS_SHOWN, Phase, Progress
from llara_dist.supervision.rank_status import (
    KILLED,
    STOPPED,
    RankRecord,
    RankStatus,
    beats_per_write,
    parse_status,
    read_status,
    read_statuses,
    status_path,
    write_status,
)
from llara_dist.supervision.shared_place import (
    SharedPlace,
    ranks_of_this_host,
    read_shared_place,
    remove_abandoned_places,
)
from llara_dist.supervision.step_clock import StepCost
from llara_dist.training.phases import Phases
from tests.runs import ROOT


def a_record(rank: int = 0, token: str = "t", **changes: object) -> RankRecord:
    record = RankRecord(
        token=token,
        rank=rank,
        world_size=4,
        process=this_process(),
        heartbeat=3,
        interval_s=5.0,
        progress=Progress(Phase.BACKWARD, 17, 2, (5, 9), 12),
        changes=100,
        idle_s=1.5,
        in_collective=False,
        ended=None,
        written_at="2026-01-01T00:00:00+0000",
    )
    return dataclasses.replace(record, **changes)


def test_a_phase_is_seen_whole_and_only_some_keys() -> None:
    status = RankStatus()
    assert status.progress == Progress(Phase.STARTING)
    status.enter(Phase.FORWARD, 3, 1, range(40, 60))
    progress, changes, idle_s = status.read()
    assert progress == Progress(Phase.FORWARD, 3, 1, tuple(range(40, 40 + KEYS_SHOWN)), 20)
    assert changes == 1
    assert idle_s >= 0
    assert progress.samples == "sample keys 40, 41, 42, 43, 44, 45, 46, 47, … (20 in all)"


def test_it_watches_the_phases_of_a_step() -> None:
    status = RankStatus()
    phases = Phases(torch.device("cpu"))
    phases.watcher = status.enter
    phases.enter(Phase.BACKWARD, 4, 1, torch.tensor([7, 8]))
    assert status.progress == Progress(Phase.BACKWARD, 4, 1, (7, 8), 2)
    phases.enter(Phase.DATA, 5)
    assert status.progress == Progress(Phase.DATA, 5)


def test_a_touch_is_progress_at_the_same_place() -> None:
    status = RankStatus()
    status.enter(Phase.VALIDATION, 3)
    before = status.progress
    time.sleep(0.2)
    idle_s = status.read()[2]
    status.touch()
    assert status.progress is before
    assert status.read()[1] == 2
    assert idle_s >= 0.2


def test_places_are_ordered_as_a_step_goes() -> None:
    way = [
        Progress(Phase.STARTING),
        Progress(Phase.LOADING),
        Progress(Phase.DATA, 0),
        Progress(Phase.FORWARD, 0, 0),
        Progress(Phase.BACKWARD, 0, 0),
        Progress(Phase.STEP, 0, 0),
        Progress(Phase.FORWARD, 0, 1),
        Progress(Phase.BACKWARD, 0, 1),
        Progress(Phase.REDUCE, 0, 1),
        Progress(Phase.STEP, 0, 1),
        Progress(Phase.VALIDATION, 0),
        Progress(Phase.CHECKPOINT, 0),
        Progress(Phase.DATA, 1),
        Progress(Phase.FINISHED, 1),
    ]
    positions = [progress.position for progress in way]
    assert positions == sorted(set(positions))
    assert way[4].place == "step 0, micro-batch 0, backward"
    assert way[2].place == "step 0, data"
    assert way[1].place == "loading"


def test_only_phases_of_a_step_are_limited() -> None:
    unlimited = {Phase.STARTING, Phase.LOADING, Phase.VALIDATION, Phase.CHECKPOINT, Phase.FINISHED}
    assert {phase for phase in Phase if not phase.is_limited} == unlimited


def test_files_are_read_back_and_other_starts_are_not(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    records = [a_record(0), a_record(1, ended="ValueError: no"), a_record(2, token="older"), a_record(3, ended="")]
    for record in records:
        write_status(tmp_path, record)
        assert parse_status(status_path(tmp_path, record.rank).read_text()) == record
    assert read_status(tmp_path, 1, "t") == records[1]
    assert read_status(tmp_path, 2, "t") is None
    assert read_status(tmp_path, 9, "t") is None
    assert read_statuses(tmp_path) == [records[0], records[1], records[3]]
    assert [record.has_failed for record in records] == [False, True, False, False]
    assert not a_record(ended=STOPPED).has_failed
    assert not a_record(ended=KILLED).has_failed


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"progress": {"phase": "dancing", "keys": []}})])
def test_what_is_no_status(text: str) -> None:
    assert parse_status(text) is None


@pytest.mark.parametrize(
    ("world", "heartbeat_s", "beats"), [(1, 5.0, 1), (500, 5.0, 1), (501, 5.0, 2), (1024, 5.0, 3), (1024, 0.5, 21)]
)
def test_all_ranks_together_write_at_most_a_hundred_files_a_second(world: int, heartbeat_s: float, beats: int) -> None:
    assert beats_per_write(world, heartbeat_s) == beats
    assert world / (beats * heartbeat_s) <= 100


def test_a_killed_rank_leaves_its_place_until_the_others_have_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    token = secrets.token_hex(8)
    code = f"""
import os, signal
from llara_dist.supervision.progress import Phase
from llara_dist.supervision.rank_status import RankStatus
from llara_dist.supervision.shared_place import SharedPlace
status = RankStatus()
status.share(SharedPlace({token!r}, 6))
for step in range(1000):
    status.enter(Phase.FORWARD, step, 2, range(step, step + 20))
os.kill(os.getpid(), signal.SIGKILL)
"""
    own = SharedPlace(token, 5)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        process.wait()
        remove_abandoned_places()  # as does whoever begins a run on this machine now: the others have yet to read it
        remove_abandoned_places()
        assert read_shared_place(token, 6) == Progress(Phase.FORWARD, 999, 2, tuple(range(999, 1007)), 20)
        assert ranks_of_this_host(token) == [5, 6]
        monkeypatch.setattr(shared_place, "READ_WITHIN_S", 0.0)
        remove_abandoned_places()
        assert ranks_of_this_host(token) == [5]
        assert read_shared_place(token, 6) is None
        own.write(Progress(Phase.DATA, 1))
        assert read_shared_place(token, 5) == Progress(Phase.DATA, 1)
    finally:
        process.wait()
        own.remove()
    assert ranks_of_this_host(token) == []


def test_a_file_of_an_older_version_is_read_and_a_newer_one_tells_what_steps_cost(tmp_path: Path) -> None:
    new = a_record(total_steps=90, cost=StepCost(3, 0.5, 2.0, 0.25, 7.0), memory_mib=12.5)
    assert parse_status(new.to_json()) == new
    values = json.loads(new.to_json())
    for name in ("total_steps", "cost", "memory_mib"):
        del values[name]
    assert parse_status(json.dumps(values)) == a_record()


def test_steps_cost_is_told_by_the_phases() -> None:
    status = RankStatus()
    for phase in (Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.REDUCE, Phase.STEP):
        status.enter(phase, 0, 0, range(5))
    assert status.cost is None
    status.enter(Phase.DATA, 1)
    assert status.cost is not None
    assert (status.cost.steps, status.cost.samples) == (1, 5.0)
    assert status.cost.whole_s > 0
