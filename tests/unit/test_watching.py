"""What `top` makes of a run's folder: who stands out, how far the run is, and that it fits the terminal."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.console import Console

from llara_dist.distributed import Job
from llara_dist.errors import InputError
from llara_dist.supervision import rank_status
from llara_dist.supervision.process_identity import ProcessIdentity, this_process
from llara_dist.supervision.progress import Phase, Progress
from llara_dist.supervision.rank_status import KILLED, STOPPED, RankRecord, write_status
from llara_dist.supervision.run_lock import RunLock
from llara_dist.supervision.step_clock import StepCost
from llara_dist.training.checkpoints.folders import newest_step
from llara_dist.watching import look
from llara_dist.watching.look import Watch, tail
from llara_dist.watching.marks import Mark, Seen, judge, state_of
from llara_dist.watching.screen import ODD, draw
from llara_dist.watching.top import top
from tests.runs import ROOT

COST = StepCost(9, 0.1, 0.8, 0.1, 4.0)


def a_record(rank: int = 0, world_size: int = 4, **changes: object) -> RankRecord:
    process = ProcessIdentity(f"node-{rank // 8:03d}.example.org", "elsewhere", 1000 + rank, 1)
    record = RankRecord(
        token="t",
        rank=rank,
        world_size=world_size,
        process=process,
        heartbeat=1,
        interval_s=5.0,
        progress=Progress(Phase.BACKWARD, 41, 2, (5, 9), 12),
        changes=100,
        idle_s=0.5,
        in_collective=False,
        ended=None,
        written_at="2026-01-01T00:00:00+0000",
        total_steps=100,
        cost=COST,
        memory_mib=512.0,
    )
    return dataclasses.replace(record, **changes)


def seen(still_s: float = 1.0, running: bool | None = None, **changes: object) -> Seen:
    return Seen(a_record(**changes), still_s, True, running)


def marks(*ranks: Seen) -> dict[int, tuple[Mark, str]]:
    numbered = [dataclasses.replace(r, record=dataclasses.replace(r.record, rank=n)) for n, r in enumerate(ranks)]
    return {each.record.rank: (each.mark, each.much) for each in judge(numbered, 15.0)}


def test_ranks_that_stand_out_come_first_and_say_how() -> None:
    slow = dataclasses.replace(COST, wait_s=1.0)
    ranks = [
        seen(),
        seen(cost=slow),
        seen(still_s=15.5),
        seen(ended="ValueError: no"),
        seen(idle_s=42.0),
        seen(idle_s=42.0, in_collective=True),
        seen(ended=KILLED),
        seen(running=False),
        seen(ended=STOPPED),
        seen(ended=""),
        seen(idle_s=1e6, progress=Progress(Phase.VALIDATION, 41)),
    ]
    found = marks(*ranks)
    assert list(found.items()) == [
        (3, (Mark.FAILED, "")),
        (6, (Mark.DEAD, "")),
        (7, (Mark.DEAD, "")),
        (2, (Mark.SILENT, "16 s")),
        (4, (Mark.STUCK, "42 s")),
        (1, (Mark.SLOW, "2.0×")),
        (5, (Mark.WAITS, "42 s")),
        (8, (Mark.STOPPED, "")),
        (0, (Mark.NONE, "")),
        (9, (Mark.NONE, "")),
        (10, (Mark.NONE, "")),
    ]


def test_long_steps_are_no_hang_and_one_rank_alone_is_never_slow() -> None:
    minutes = dataclasses.replace(COST, compute_s=60.0)
    assert marks(seen(cost=minutes, idle_s=200.0), seen(cost=minutes)) == {0: (Mark.NONE, ""), 1: (Mark.NONE, "")}
    assert marks(seen(cost=minutes)) == {0: (Mark.NONE, "")}
    first = dataclasses.replace(COST, steps=1, compute_s=60.0)
    assert marks(seen(cost=first), seen(), seen())[0] == (Mark.NONE, "")


@pytest.mark.parametrize("ended", [None, "ValueError: no"])
def test_where_collectives_are_not_seen_the_rank_behind_is_stuck_and_the_others_wait_for_it(ended: str | None) -> None:
    there = Progress(Phase.REDUCE, 41, 3)
    ranks = [seen(rank=rank, idle_s=14.0, progress=there) for rank in range(64)]
    ranks[17] = seen(rank=17, idle_s=14.0, progress=Progress(Phase.DATA, 41), ended=ended)
    first, *others = judge(ranks, 15.0)
    assert (first.record.rank, first.short) == (17, "stuck 14 s" if ended is None else "failed")
    assert {each.short for each in others} == {"waits 14 s"}
    assert state_of([first, *others], 0, 10) == f"in trouble: 1 {first.mark}"


def test_before_any_rank_has_ended_a_step_it_takes_minutes_to_be_stuck() -> None:
    loading, hanging = seen(idle_s=290.0, cost=None), seen(idle_s=310.0, cost=None)
    assert marks(loading, loading) == {0: (Mark.NONE, ""), 1: (Mark.NONE, "")}
    assert marks(hanging, loading)[0] == (Mark.STUCK, "310 s")
    assert marks(loading, seen())[0] == (Mark.STUCK, "290 s")  # the other one has ended a step


@pytest.mark.parametrize(
    ("ranks", "missing", "saved", "state"),
    [
        ([], 0, None, "not started"),
        ([seen()], 0, None, "running"),
        ([seen(progress=Progress(Phase.LOADING))], 0, None, "starting"),
        ([seen()], 3, None, "starting: 3 of 4 ranks to come"),
        ([seen(progress=Progress(Phase.VALIDATION, 3))], 0, 10, "running: validation"),
        ([seen(), seen(ended="ValueError: no"), seen(still_s=99.0)], 0, 10, "in trouble: 1 failed, 1 silent"),
        ([seen(idle_s=60.0, in_collective=True)] * 2, 0, 10, "stands still: every rank waits in a collective"),
        ([seen(ended=STOPPED), seen(ended=KILLED)], 0, 10, "1 dead"),
        ([seen(ended="ValueError: no")], 0, 10, "failed"),
        ([seen(running=False)], 0, 10, "dead"),
        ([seen(ended=""), seen(ended="")], 0, 100, "finished"),
        ([seen(ended="")], 0, 40, "ended; saved up to step 40"),
        ([seen(ended="")], 0, None, "ended"),
    ],
)
def test_the_state_of_a_run(ranks: list[Seen], missing: int, saved: int | None, state: str) -> None:
    assert state_of(judge(ranks, 15.0), missing, saved) == state


def a_row(step: int) -> dict[str, object]:
    told = {"step": step, "epoch": 0, "loss": 1.25, "p": 0.4, "hybrid_share": 0.375, "skipped_steps": 2}
    return told | {"samples": 16, "tokens": 2000, "data_wait_s": 0.1, "step_s": 0.9, "saving_s": 0.0, "mfu": None}


def fill(run: Path, world_size: int, **changes: object) -> None:
    """A run's folder as it would be after 42 of 100 steps."""
    (run / "ranks").mkdir(parents=True, exist_ok=True)
    for rank in range(world_size):
        write_status(run, a_record(rank, world_size, **changes))
    (run / "metrics.jsonl").write_text("".join(json.dumps(a_row(step)) + "\n" for step in range(42)) + '{"step": 4')
    (run / "validation.jsonl").write_text(json.dumps({"step": 40, "hit_ratio": 0.5, "loss": 1.0}) + "\n")
    for step in (20, 40):
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "step-00000020" / "complete.json").write_text("{}")
    (run / "checkpoints" / "best.json").write_text(json.dumps({"step": 20, "hit_ratio": 0.625, "loss": 1.0}))


def shown(watch: Watch, width: int, every_rank: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(draw(watch.look(), width, every_rank))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_run_in_a_few_lines(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    with RunLock(tmp_path, Job("77", 1), 60.0) as lock:
        lines = shown(Watch(tmp_path), 300)
        assert lines[0] == f"{tmp_path}  running"
        assert lines[1].startswith("job 77 (restart 1), ")
        assert f"pid {lock._record.process.pid}, since 20" in lines[1]
    assert lines[2:5] == [
        "step 42/100 (42.0%)  epoch 0  loss 1.2500  p 0.400 (realised 0.375)  skipped 2",
        "2,000 tokens/s  16.0 samples/s  wait 10.0%  512 MiB  ETA 0:00:58",
        "saved: step 20  validated: step 40, HR@1 0.5000  best: step 20, HR@1 0.6250",
    ]
    assert lines[5].split() == "rank host pid step mb phase wait s compute s exchange s samples/s MiB seen".split()
    assert lines[6].split() == "0 node-000 1000 41 2 backward 0.100 0.800 0.100 4.0 512 > 0 s".split()


def test_a_silent_rank_is_seen_by_its_heartbeat_and_a_new_start_begins_anew(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    now = 100.0
    watch = Watch(tmp_path, clock=lambda: now)
    watch.look()
    now += 10
    write_status(tmp_path, a_record(0, 2, heartbeat=2))
    watch.look()
    now += 0.5
    write_status(tmp_path, a_record(0, 2, heartbeat=3))
    assert watch.look().ranks[0].record.heartbeat == 2  # not read so soon after the last time
    write_status(tmp_path, a_record(0, 2, heartbeat=2))
    now += 5.5
    view = watch.look()
    assert [(each.record.rank, each.mark, each.seen.still_s) for each in view.ranks] == [
        (1, Mark.SILENT, 16.0),
        (0, Mark.NONE, 6.0),
    ]
    assert not view.is_over
    write_status(tmp_path, a_record(0, 2, token="u"))
    now += 1
    view = watch.look()
    assert [(each.record.token, each.seen.moved) for each in view.ranks] == [("u", False)]
    assert view.missing == (1,)
    assert view.to_json()["missing_ranks"] == [1]


def test_once_watches_only_who_was_not_seen_to_move_and_only_as_often_as_they_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four ranks on other hosts one moves at once and one after a while; two are gone, one of them while idle."""
    now, heard = 100.0, []
    (tmp_path / "ranks").mkdir()
    for rank in range(4):
        write_status(tmp_path, a_record(rank, idle_s=400.0 if rank == 3 else 0.5))

    def sleep(seconds: float) -> None:
        nonlocal now
        assert seconds == 1.0  # a fifth of an interval
        now += seconds
        write_status(tmp_path, a_record(0, heartbeat=2))
        if now > 105:
            write_status(tmp_path, a_record(1, heartbeat=2))

    def read_status(run: Path, rank: int, token: str) -> RankRecord | None:
        heard.append(rank)
        return rank_status.read_status(run, rank, token)

    monkeypatch.setattr(look.time, "sleep", sleep)
    monkeypatch.setattr(look, "read_status", read_status)
    view = Watch(tmp_path, clock=lambda: now).look_until_settled()
    assert {each.record.rank: each.short for each in view.ranks} == {0: "", 1: "", 2: "silent 16 s", 3: "silent 16 s"}
    assert {rank: heard.count(rank) for rank in range(4)} == {0: 1, 1: 6, 2: 16, 3: 16}


@pytest.mark.parametrize("name", ["step-00000300.bak", "step-300", "step-x", ".step-00000300"])
def test_only_folders_named_as_checkpoints_are_checkpoints(name: str, tmp_path: Path) -> None:
    fill(tmp_path, 1)
    (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / name / "complete.json").write_text("{}")
    assert newest_step(tmp_path / "checkpoints") == 20


@pytest.mark.parametrize("world_size", [2, 16, 1024])
@pytest.mark.parametrize("width", [80, 140])
def test_it_fits_the_terminal(world_size: int, width: int, tmp_path: Path) -> None:
    fill(tmp_path, world_size)
    write_status(tmp_path, a_record(1, world_size, ended="RuntimeError: " + "CUDA error " * 9))
    for rank in range(10, min(world_size, 60)):
        write_status(tmp_path, a_record(rank, world_size, idle_s=60.0))
    lines = shown(Watch(tmp_path), width)
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines[2:] if "more, ranks" not in line)
    header = next(place for place, line in enumerate(lines) if line.startswith("rank "))
    assert lines[header + 1].split()[0] == "1"
    assert any(line.startswith("rank 1 failed: RuntimeError: CUDA error") for line in lines)
    if world_size == 1024:
        assert f"{world_size:,} ranks on 128 hosts in step 41: backward 1,024" in lines
        assert ["samples/s", "4.000", "0", "4.000", "4.000", "1023"] in [line.split() for line in lines]
        stuck = [line for line in lines if line.endswith(" stuck 60 s")]
        assert len(stuck) == ODD
        assert "stuck: 44 more, ranks 16–59" in lines
        assert len(shown(Watch(tmp_path), width, every_rank=True)) > 1024
    else:
        assert sum(line.endswith(("s", "failed", "stuck 60 s")) for line in lines[header + 1 :]) >= world_size


def test_ends_of_logs_are_read_and_not_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "fill": "x" * 100}) + "\n" for step in range(9000)))
    rows = tail(path)
    assert rows[-1]["step"] == 8999
    assert 100 < len(rows) < 1000
    assert tail(tmp_path / "nothing") == []


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder; give the --out of a run"):
        top(tmp_path / "nothing", once=True)
    with pytest.raises(InputError, match="--every=0: must be positive"):
        top(tmp_path, every=0)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "llara_dist.cli", "top", *arguments]


def test_once_needs_no_terminal_and_what_is_live_does(tmp_path: Path) -> None:
    wide = {**os.environ, "COLUMNS": "500"}
    done = subprocess.run(
        command(str(tmp_path), "--once", "--json"), cwd=ROOT, env=wide, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first == f"{tmp_path}  not started"
    assert json.loads(last)["ranks"] == []
    done = subprocess.run(command(str(tmp_path)), cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert done.stderr.startswith("error: stdout is no terminal")
    code = f"import sys; from llara_dist.cli import main; main({command(str(tmp_path), '--once')[3:]!r})"
    code += "; assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_once_tells_a_rank_at_work_from_one_that_was_killed(tmp_path: Path) -> None:
    """Processes of this machine, of which it is known at once whether they live; their heartbeats move or do not."""
    (tmp_path / "ranks").mkdir()
    sleeper = subprocess.Popen(["sleep", "600"])
    try:
        dead = dataclasses.replace(this_process(), pid=sleeper.pid, started=1)
        write_status(tmp_path, a_record(0, 2, interval_s=0.2, process=this_process()))
        write_status(tmp_path, a_record(1, 2, interval_s=0.2, process=dead))
        began = time.monotonic()
        process = subprocess.Popen(command(str(tmp_path), "--once", "--json"), cwd=ROOT, stdout=-1, text=True)
        heartbeat = 1
        while process.poll() is None:
            heartbeat += 1
            write_status(tmp_path, a_record(0, 2, interval_s=0.2, process=this_process(), heartbeat=heartbeat))
            assert time.monotonic() - began < 60
            time.sleep(0.05)
        said, _ = process.communicate()
    finally:
        sleeper.kill()
        sleeper.wait()
    found = json.loads(said.splitlines()[-1])
    assert found["state"] == "in trouble: 1 dead"
    assert [rank["mark"] for rank in found["ranks"]] == ["", "dead"]


@pytest.mark.parametrize("end", ["q", "Ctrl-C"])
def test_it_is_drawn_again_and_again_until_somebody_ends_it(end: str, tmp_path: Path) -> None:
    fill(tmp_path, 2)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    process = subprocess.Popen(
        command(str(tmp_path), "--every", "0.1"),
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm-256color"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    drawn = b""

    def read_until(text: bytes, count: int = 1) -> None:
        nonlocal drawn
        deadline = time.monotonic() + 60
        while drawn.count(text) < count:
            assert time.monotonic() < deadline, drawn.decode()
            if select.select([ours], [], [], 0.2)[0]:
                drawn += os.read(ours, 1 << 16)

    try:
        read_until(b"step 42/100", 3)
        write_status(tmp_path, a_record(1, 2, ended="ValueError: odd"))
        read_until(b"rank 1 failed: ValueError: odd")
        if end == "q":
            os.write(ours, b"q")
        else:
            process.send_signal(signal.SIGINT)
        read_until(b"\x1b[?1049l")  # back on the screen as it was before
        while process.poll() is None:
            if select.select([ours], [], [], 0.2)[0]:
                drawn += os.read(ours, 1 << 16)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
    assert process.returncode == 0
    assert b"Traceback" not in drawn
    assert b"interrupted" not in drawn
