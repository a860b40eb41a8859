"""One job at a time works in a run's folder; a dead one's lock is taken, a living one's is not."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from llara_dist.distributed import Job, World
from llara_dist.errors import InputError
from llara_dist.supervision.heartbeat import create_exclusively
from llara_dist.supervision.process_identity import this_process
from llara_dist.supervision.run_lock import LockRecord, RunLock, hold_run, is_free, parse_lock

CONTEXT = multiprocessing.get_context("spawn")
JOB = Job("7@cluster", 0, "0")


def wait_for(condition: Callable[[], object], what: str, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {limit_s} s"
        time.sleep(0.01)


def record_of(path: Path) -> LockRecord:
    record = parse_lock(path.read_text())
    assert record is not None
    return record


def elsewhere(record: LockRecord, **changes: Any) -> str:
    """The record as a process of another host would have written it."""
    process = dataclasses.replace(record.process, host="node-b", machine="another machine", pid=4711)
    return dataclasses.replace(record, process=process, **changes).to_json()


@pytest.fixture
def record(tmp_path: Path) -> LockRecord:
    """A lock that this process holds."""
    with RunLock(tmp_path / "sample", JOB, 0.2) as lock:
        return record_of(lock.path)


def hold(out: Path, answer: Path, job: Job, heartbeat_s: float, done: Path) -> None:
    """In another process: take the lock, say how it went, hold it until `done` is there or it is lost."""
    try:
        with RunLock(out, job, heartbeat_s) as lock:
            answer.write_text("taken")
            while not done.exists() and lock.lost is None:
                time.sleep(0.01)
            if lock.lost is not None:
                (answer.parent / "lost").write_text(lock.lost)
    except InputError as error:
        answer.write_text(str(error))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[BaseProcess, Path]]]:
    """Starts processes that take the lock of `tmp_path / run`; they are killed in the end."""
    processes: list[BaseProcess] = []

    def begin(job: Job = JOB, heartbeat_s: float = 0.2) -> tuple[BaseProcess, Path]:
        answer = tmp_path / f"answer-{len(processes)}"
        arguments = (tmp_path / "run", answer, job, heartbeat_s, tmp_path / "done")
        process = CONTEXT.Process(target=hold, args=arguments)
        processes.append(process)
        process.start()
        return process, answer

    yield begin
    for process in processes:
        process.kill()
        process.join()


def test_of_eight_racers_one_wins(start: Callable[..., tuple[BaseProcess, Path]], tmp_path: Path) -> None:
    racers = [start(Job(str(number)), 2.0) for number in range(8)]
    answers = [answer for _, answer in racers]
    wait_for(lambda: all(answer.exists() and answer.read_text() for answer in answers), "eight answers")
    texts = [answer.read_text() for answer in answers]
    assert texts.count("taken") == 1, texts
    assert all("works in this folder" in text for text in texts if text != "taken")
    (tmp_path / "done").touch()
    for process, _ in racers:
        process.join()
    (left,) = (tmp_path / "run").iterdir()
    assert record_of(left).released


def test_eight_racers_for_a_stale_lock(
    start: Callable[..., tuple[BaseProcess, Path]], tmp_path: Path, record: LockRecord
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock-000004.json").write_text(elsewhere(record))
    answers = [start(Job(str(number)), 2.0)[1] for number in range(8)]
    wait_for(lambda: all(answer.exists() and answer.read_text() for answer in answers), "eight answers")
    assert [answer.read_text() for answer in answers].count("taken") == 1
    assert {path.name for path in (tmp_path / "run").glob("lock-*")} == {"lock-000004.json", "lock-000005.json"}


def test_a_killed_holder_on_this_host_is_replaced_at_once(
    start: Callable[..., tuple[BaseProcess, Path]], tmp_path: Path
) -> None:
    process, answer = start(heartbeat_s=600.0)
    wait_for(answer.exists, "the lock taken")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    # Watching a heartbeat of 600 s would run into the test's time limit.
    with RunLock(tmp_path / "run", Job("8"), 600.0) as lock:
        assert lock.path.name == "lock-000002.json"


def test_a_suspended_holder_loses_the_run_and_finds_out(
    start: Callable[..., tuple[BaseProcess, Path]], tmp_path: Path
) -> None:
    process, answer = start()
    wait_for(answer.exists, "the lock taken")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    with RunLock(tmp_path / "run", Job("8@cluster"), 0.2) as lock:
        os.kill(process.pid, signal.SIGCONT)
        wait_for((tmp_path / "lost").exists, "the suspended holder's notice")
        wait_for((tmp_path / "lost").read_text, "its text")
        assert "job 8@cluster (restart 0)" in (tmp_path / "lost").read_text()
        lock.check()
        process.join()
        assert lock.lost is None
    assert record_of(lock.path).released


def test_a_requeued_job_takes_its_own_lock_at_once(tmp_path: Path) -> None:
    with RunLock(tmp_path, JOB, 600.0) as first:
        with RunLock(tmp_path, dataclasses.replace(JOB, restart=1), 600.0) as second:
            with pytest.raises(InputError, match=r"job 7@cluster \(restart 1\) on .* took this run over"):
                first.check()
            second.check()
        assert first.lost is not None
    assert record_of(second.path).released


@pytest.mark.parametrize(
    ("holder", "asks", "running", "free"),
    [
        (Job("7", 0), Job("7", 1), None, True),
        (Job("7", 0), Job("7", 1), True, True),
        (Job("7", 1), Job("7", 1), None, False),
        (Job("7", 2), Job("7", 1), None, False),
        (Job("7", 0), Job("8", 1), None, False),
        (Job(), Job("", 1), None, False),
        (Job("7", 0), Job("8", 0), False, True),
        (Job("7", 0), Job("8", 0), True, False),
    ],
)
def test_what_may_be_taken_at_once(
    record: LockRecord, holder: Job, asks: Job, running: bool | None, free: bool
) -> None:
    held = dataclasses.replace(record, job=holder)
    assert is_free(held, asks, running) is free
    assert is_free(dataclasses.replace(held, released=True), asks, running)


def test_a_moving_heartbeat_of_another_host_refuses_with_one_line(tmp_path: Path, record: LockRecord) -> None:
    path = tmp_path / "lock-000003.json"
    path.write_text(elsewhere(record, heartbeat_s=5.0))
    ended = threading.Event()

    def beat() -> None:
        heartbeat = 0
        while not ended.wait(0.05):
            heartbeat += 1
            staging = tmp_path / "staging"
            staging.write_text(elsewhere(record, heartbeat=heartbeat, heartbeat_s=5.0))
            staging.replace(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(InputError) as caught, RunLock(tmp_path, Job("8"), 5.0):
            pass
    finally:
        ended.set()
        thread.join()
    message = str(caught.value)
    for part in (str(tmp_path), "job 7@cluster (restart 0)", "node-b", "pid 4711", "--out", str(path)):
        assert part in message
    assert "\n" not in message
    assert [entry.name for entry in tmp_path.glob("lock-*")] == [path.name]


def test_a_lock_that_stands_still_is_taken(tmp_path: Path, record: LockRecord) -> None:
    (tmp_path / "lock-000003.json").write_text(elsewhere(record))
    with RunLock(tmp_path, Job("8"), 0.2) as lock:
        assert lock.path.name == "lock-000004.json"
        wait_for(lambda: record_of(lock.path).heartbeat >= 2, "heartbeats")
    assert record_of(lock.path).released


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": 1}', "null", '{"job": 1, "process": 2}'])
def test_what_is_no_lock(text: str) -> None:
    assert parse_lock(text) is None


def test_an_unreadable_lock_is_watched_then_taken(tmp_path: Path) -> None:
    (tmp_path / "lock-000001.json").write_text("{")
    with RunLock(tmp_path, JOB, 0.2) as lock:
        assert lock.path.name == "lock-000002.json"


def test_a_released_lock_is_free_and_only_the_last_one_stays(tmp_path: Path) -> None:
    for number in range(1, 5):
        with RunLock(tmp_path, Job(str(number)), 600.0) as lock:
            assert lock.path.name == f"lock-{number:06d}.json"
            values = json.loads(lock.path.read_text())
            assert values["job"] == {"name": str(number), "restart": 0, "step": ""}
            assert values["process"] == dataclasses.asdict(this_process())
            assert lock.lost is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock-000003.json", "lock-000004.json"]


def test_a_lock_removed_by_hand_is_lost(tmp_path: Path) -> None:
    with RunLock(tmp_path, JOB, 0.05) as lock:
        lock.path.unlink()
        wait_for(lambda: lock.lost, "the notice")
        assert "removed" in str(lock.lost)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_fails_for_a_while_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLock(tmp_path, JOB, 0.05) as lock:
        before = record_of(lock.path).heartbeat
        failed = threading.Event()

        def refuse(*arguments: object) -> None:
            failed.set()
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        with monkeypatch.context() as patch:
            patch.setattr("llara_dist.supervision.run_lock.replace_text", refuse)
            assert failed.wait(60)
        wait_for(lambda: record_of(lock.path).heartbeat > before + 1, "heartbeats again")
        assert lock.lost is None
    assert "Disk quota exceeded" in capsys.readouterr().err


def test_exclusive_creation_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    assert create_exclusively(tmp_path / "claim", "one", tmp_path / "staging")
    assert not create_exclusively(tmp_path / "claim", "two", tmp_path / "staging")
    assert (tmp_path / "claim").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["claim"]


def test_a_link_whose_answer_was_lost_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def retransmitted(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists", str(target))

    monkeypatch.setattr(os, "link", retransmitted)
    assert create_exclusively(tmp_path / "claim", "one", tmp_path / "staging")


def test_hold_run_gives_the_token_and_refuses_folders_it_cannot_make(tmp_path: Path) -> None:
    with hold_run(tmp_path / "run", 600.0, World(), JOB) as held:
        assert held.lost is None
        assert held.lock is not None
        assert record_of(held.lock.path).token == held.token
        held.check()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"), hold_run(tmp_path / "file", 600.0, World(), JOB):
        pass
