"""Checkpoints in the background: what is saved is the moment of the save, and nothing that goes wrong loses it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llara_dist.errors import InputError
from llara_dist.training.checkpoints import writer as checkpoint_writer
from llara_dist.training.checkpoints.best import read_best, write_best
from llara_dist.training.checkpoints.checkpoint import best_checkpoint, newest_checkpoint, open_checkpoint
from llara_dist.training.checkpoints.snapshot import Snapshot, write_snapshot
from llara_dist.training.checkpoints.writer import CheckpointWriter, free_bytes, rotate
from llara_dist.training.scores import ValidationScores
from tests.unit.checkpoints import SmallEngine, snapshot, write_checkpoint

LIMIT_S = 60.0
"""for what must happen at once; a machine under load may take a while"""


class SlowDisk:
    """Writes when it is let to."""

    def __init__(self) -> None:
        self.begun, self.let = threading.Event(), threading.Event()
        self.now = self.most = 0

    def __call__(self, folder: Path, taken: Snapshot) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        self.begun.set()
        assert self.let.wait(LIMIT_S)
        write_snapshot(folder, taken)
        self.now -= 1


def failing(error: Exception, *steps: int) -> Callable[[Path, Snapshot], None]:
    """A disk on which the checkpoints of these steps are half written, then fail."""

    def write(folder: Path, taken: Snapshot) -> None:
        if taken.step not in steps:
            return write_snapshot(folder, taken)
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise error

    return write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_steps_go_on_while_the_checkpoint_is_written_and_do_not_change_it(tmp_path: Path) -> None:
    disk, engine = SlowDisk(), SmallEngine()
    with CheckpointWriter(tmp_path, keep_last=2, write=disk) as writer:
        engine.step()
        saved = engine.copies()
        state: dict[str, Any] = {"step": 1, "progress": {"skipped": 3}}
        writer.save(engine, state)  # type: ignore[arg-type]
        state["progress"]["skipped"] = 99
        assert disk.begun.wait(LIMIT_S)
        for _ in range(3):
            engine.step()
        assert writer.ended() == []
        assert newest_checkpoint(tmp_path) is None
        disk.let.set()
        writer.wait()
        ended = writer.ended()
    assert [(each.step, each.problem) for each in ended] == [(1, None)]
    assert ended[0].seconds > 0
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.progress) == (1, {"skipped": 3})
    stored = load_file(found.path / "optimizer.safetensors")
    assert stored.keys() == saved.keys()
    assert all(torch.equal(stored[name], saved[name]) for name in saved)
    assert all(not torch.equal(saved[name], value) for name, value in engine.copies().items())


def test_the_next_save_waits_for_the_write_before_it(tmp_path: Path) -> None:
    disk, engine = SlowDisk(), SmallEngine()
    engine.step()
    times = []
    with CheckpointWriter(tmp_path, keep_last=2, write=disk) as writer:
        writer.save(engine, {"step": 1})  # type: ignore[arg-type]
        second = threading.Thread(target=lambda: times.append(writer.save(engine, {"step": 2})))  # type: ignore[arg-type]
        second.start()
        second.join(2.0)
        assert second.is_alive()
        disk.let.set()
        second.join(LIMIT_S)
        assert times[0].waited_s >= 0.2
        assert times[0].blocked_s >= times[0].waited_s
        writer.wait()
        assert [each.step for each in writer.ended()] == [1, 2]
    assert disk.most == 1
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_synchronous_save_is_done_when_it_returns(tmp_path: Path) -> None:
    engine = SmallEngine()
    engine.step()
    with CheckpointWriter(tmp_path, keep_last=1, asynchronous=False) as writer:
        for step in (1, 2):
            writer.save(engine, {"step": step})  # type: ignore[arg-type]
            assert names(tmp_path) == [f"step-{step:08d}"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "x"), "(No space left on device): it needs 1.0 MiB, "),
        (OSError(errno.EDQUOT, "x"), "; make room within your quota there"),
        (OSError(errno.EFBIG, "x"), "(File too large)"),
        (OSError(errno.EIO, "x"), "(Input/output error)"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "; make room there"),
    ],
)
def test_what_the_disk_refuses_is_said_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    with CheckpointWriter(tmp_path, keep_last=2, write=failing(error, 2)) as writer:
        for step in (1, 2):
            writer.write(snapshot(step))
        with pytest.raises(InputError, match=r"step 2 was not written.*safe up to step 1.*--resume auto"):
            writer.wait()
        assert names(tmp_path) == ["step-00000001"]
        writer.write(snapshot(3))
        writer.wait()
        assert [each.problem is None for each in writer.ended()] == [True, False, True]
    assert names(tmp_path) == ["step-00000001", "step-00000003"]
    line = capsys.readouterr().out
    assert said in line
    assert f"{tmp_path}: the checkpoint of step 2 was not written" in line
    assert "MiB are free; the run is safe up to step 1; " in line
    assert line.endswith("the run goes on and tries again at its next checkpoint\n")
    assert line.count("\n") == 1


def test_a_save_that_must_succeed_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = SmallEngine()
    engine.step()
    with CheckpointWriter(tmp_path, 2, write=failing(OSError(errno.ENOSPC, "x"), 7)) as writer:
        with pytest.raises(InputError, match=r"nothing is saved yet; make room there; then start again"):
            writer.save(engine, {"step": 7}, required=True)  # type: ignore[arg-type]
        writer.save(engine, {"step": 8}, required=True)  # type: ignore[arg-type]
    assert names(tmp_path) == ["step-00000008"]
    assert "the run goes on" not in capsys.readouterr().out


def test_free_space_is_looked_at_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[int] = []
    monkeypatch.setattr(checkpoint_writer, "free_bytes", lambda folder: 1000)
    with CheckpointWriter(tmp_path, 2, write=lambda folder, taken: written.append(taken.step)) as writer:
        writer.write(snapshot(1))
    assert written == []
    assert "needs 1.0 MiB, 0.0 MiB are free; nothing is saved yet; make room there" in capsys.readouterr().out


def test_a_mistake_in_the_thread_is_never_lost(tmp_path: Path) -> None:
    write = failing(ZeroDivisionError("a mistake"), 1)
    engine = SmallEngine()
    for end in (
        lambda writer: writer.save(engine, {"step": 2}),
        lambda writer: writer.wait(),
        lambda writer: writer.__exit__(None, None, None),
    ):
        writer = CheckpointWriter(tmp_path, 2, write=write)
        writer.write(snapshot(1))
        with pytest.raises(ZeroDivisionError, match="a mistake"):
            end(writer)


def test_a_mistake_in_the_thread_is_noted_on_the_error_that_ends_the_run(tmp_path: Path) -> None:
    def run() -> None:
        with CheckpointWriter(tmp_path, 2, write=failing(ZeroDivisionError("a mistake"), 1)) as writer:
            writer.write(snapshot(1))
            raise KeyError("the run's own error")

    with pytest.raises(KeyError) as caught:
        run()
    assert "ZeroDivisionError('a mistake')" in caught.value.__notes__[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs mount")
    if done.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_disk_that_is_really_full(
    small_disk: Path, foreseen: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not foreseen:  # as where a quota shows only when it is reached
        monkeypatch.setattr(checkpoint_writer, "free_bytes", lambda folder: None)
    folder, filler = small_disk / "checkpoints", small_disk / "filler"
    with CheckpointWriter(folder, keep_last=1) as writer:
        writer.write(snapshot(1, elements=40_000))
        writer.wait()
        filler.write_bytes(bytes((free_bytes(small_disk) or 0) - 300_000))
        writer.write(snapshot(2, elements=40_000))
        with pytest.raises(InputError, match=r"step 2 was not written \(No space left on device\)"):
            writer.wait()
        assert names(folder) == ["step-00000001"]
        filler.unlink()
        writer.write(snapshot(3, elements=40_000))
        writer.wait()
    assert names(folder) == ["step-00000003"]
    assert open_checkpoint(folder / "step-00000003").step == 3
    assert "safe up to step 1" in capsys.readouterr().out


def test_a_real_limit_on_the_size_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointWriter(tmp_path, keep_last=2) as writer:
        writer.write(snapshot(1))
        writer.wait()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
            writer.write(snapshot(2))
            with pytest.raises(InputError, match=r"\(File too large\).*ulimit -f"):
                writer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["step-00000001"]
    assert "safe up to step 1" in capsys.readouterr().out


def test_rotation_keeps_the_newest_complete_checkpoints(tmp_path: Path) -> None:
    for step, complete in ((1, True), (2, True), (3, False), (4, True), (9, False)):
        (tmp_path / f"step-{step:08d}").mkdir()
        if complete:
            (tmp_path / f"step-{step:08d}" / "complete.json").touch()
    (tmp_path / ".step-00000004.17.staging").mkdir()
    (tmp_path / "step-00000001.mine").mkdir()
    rotate(tmp_path, tmp_path / "step-00000004", keep_last=2)
    assert names(tmp_path) == ["step-00000001.mine", "step-00000002", "step-00000004"]
    rotate(tmp_path, tmp_path / "step-00000004", keep_last=9)
    assert len(names(tmp_path)) == 3
    rotate(tmp_path, tmp_path / "step-00000004", keep_last=1)
    assert names(tmp_path) == ["step-00000001.mine", "step-00000004"]


def test_the_best_stays_until_another_is_better(tmp_path: Path) -> None:
    bests = {2: ValidationScores(2, 0.5, 1.0), 5: ValidationScores(5, 0.6, 1.0)}
    kept = []
    with CheckpointWriter(tmp_path, keep_last=2) as writer:
        for step in range(1, 7):
            writer.write(snapshot(step), bests.get(step))
            writer.wait()
            kept.append([int(path.name[5:]) for path in sorted(tmp_path.glob("step-*"))])
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [4, 5], [5, 6]]
    assert read_best(tmp_path) == bests[5]


def test_a_best_that_a_resumed_run_passed_over_is_unnamed_before_it_goes(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    write_best(tmp_path, ValidationScores(3, 0.5, 1.0))
    (tmp_path / "step-00000003" / "optimizer.safetensors").write_bytes(b"damaged")
    assert newest_checkpoint(tmp_path).step == 2  # type: ignore[union-attr]
    rotate(tmp_path, tmp_path / "step-00000002", keep_last=2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_damaged_best_json_costs_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.joinpath("best.json").write_text("{")
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    assert names(tmp_path) == ["best.json", "step-00000001", "step-00000002"]
    assert "step-00000002: saved, but best.json or older checkpoints could not be brought up to date" in (
        capsys.readouterr().out
    )


def save_without_end(folder: Path, reports: Connection) -> None:
    """Save growing steps, every third the best so far, and report each that is complete, until killed."""
    found = newest_checkpoint(folder)
    step = found.step if found is not None else 0
    with CheckpointWriter(folder, keep_last=2) as writer:
        while True:
            step += 1
            writer.write(snapshot(step), ValidationScores(step, float(step), 0.0) if step % 3 == 0 else None)
            for written in writer.ended():
                assert written.problem is None
                reports.send_bytes(written.step.to_bytes(8))


@pytest.mark.parametrize("times", [10, pytest.param(50, marks=pytest.mark.long)])
def test_killed_while_saving(tmp_path: Path, times: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "safetensors.torch", __name__])
    draw = random.Random(7)
    reported, left_half, leftovers = 0, 0, []
    for _ in range(times):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=save_without_end, args=(tmp_path, theirs), daemon=True)
        process.start()
        theirs.close()
        assert ours.poll(LIMIT_S), "nothing is saved"
        reported = max(reported, int.from_bytes(ours.recv_bytes()))
        assert not any(path.exists() for path in leftovers)
        time.sleep(draw.uniform(0.0, 0.03))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        try:
            while True:
                reported = max(reported, int.from_bytes(ours.recv_bytes()))
        except EOFError:
            ours.close()
        newest = newest_checkpoint(tmp_path)
        assert newest is not None
        assert newest.step >= reported
        values = load_file(newest.path / "optimizer.safetensors")
        assert all(bool((value == newest.step).all()) for value in values.values())
        if read_best(tmp_path) is not None:
            assert best_checkpoint(tmp_path).step % 3 == 0
        leftovers = list(tmp_path.glob(".*"))
        left_half += bool(leftovers)
    assert reported >= times
    assert left_half > 0, "no kill fell into a write"


def test_a_writer_whose_run_was_taken_over_names_removes_and_drops_nothing(tmp_path: Path) -> None:
    taken: list[str] = []

    def may_write() -> None:
        if taken:
            raise InputError(f"{tmp_path}: {taken[0]} took this run over")

    def overtaken_in_mid_write(staging: Path, given: Snapshot) -> None:
        write_snapshot(staging, given)
        taken.append("job 8")
        for step in (20, 30):
            write_checkpoint(tmp_path, step)
        (tmp_path / ".step-00000040.other.staging").mkdir()

    with CheckpointWriter(tmp_path, 1, write=overtaken_in_mid_write, may_write=may_write) as writer:
        writer.write(snapshot(10))
        with pytest.raises(InputError, match="job 8 took this run over"):
            writer.wait()
        writer.write(snapshot(11))
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == [".step-00000040.other.staging", "step-00000020", "step-00000030"]
