"""What a rank prints is in its log and where it went before, however the rank ends."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llara_dist.supervision.process_identity import process_state
from llara_dist.supervision.rank_logs import log_path
from tests.runs import ROOT

RANK = """
import os, signal, sys, time
from pathlib import Path
from llara_dist.distributed import Job, World
from llara_dist.errors import InputError
from llara_dist.supervision import rank_logs
rank_logs.DRAIN_S = {drain_s}
out = Path(sys.argv[1])
with rank_logs.RankLog(World({rank}, {rank}, 4)) as log:
    pid = log._process.pid if log._process else 0
    print("before the lock")
    {begin}
    {body}
print(f"afterwards {{pid}}")
"""
BEGIN = 'log.begin(out, Job("77", 1))'
DRAIN_S = 60.0
"""longer than a rank of a run waits for its log: what a test reads once the rank has ended is to be there"""


def start(
    out: Path, body: str, rank: int = 1, begin: str = BEGIN, drain_s: float = DRAIN_S, **streams: int
) -> subprocess.Popen[str]:
    code = RANK.format(rank=rank, begin=begin, body=body, drain_s=drain_s)
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen([sys.executable, "-c", code, str(out)], cwd=ROOT, text=True, **given)


def run(out: Path, body: str, begin: str = BEGIN, drain_s: float = DRAIN_S, **streams: int) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of rank 1 of 4."""
    process = start(out, body, begin=begin, drain_s=drain_s, **streams)
    said, errors = process.communicate(timeout=2 * DRAIN_S)
    return process.returncode, said, errors


def read_log(out: Path, *parts: str, rank: int = 1) -> str:
    """The log once it holds these: the relay of a rank that was killed may still be writing."""
    deadline = time.monotonic() + 30
    text = ""
    while not all(part in text for part in parts):
        assert time.monotonic() < deadline, text
        time.sleep(0.01)
        path = log_path(out, rank)
        text = path.read_text() if path.exists() else ""
    return text


def require_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while process_state(pid)[0] not in ("", "Z"):
        assert time.monotonic() < deadline, f"process {pid} is left behind"
        time.sleep(0.05)


def test_a_log_holds_all_that_was_printed_and_the_launcher_still_gets_it(tmp_path: Path) -> None:
    body = 'print("python"); os.write(2, b"native\\n"); print("error", file=sys.stderr)'
    code, said, errors = run(tmp_path, body)
    assert code == 0
    assert said.splitlines()[:-1] == ["before the lock", "python"]
    assert errors.splitlines() == ["native", "error"]
    header, *lines, ending = log_path(tmp_path, 1).read_text().splitlines()
    assert header.startswith("=== ")
    assert " rank 1 of 4 on " in header
    assert header.endswith(", job 77 (restart 1)")
    assert sorted(lines) == ["before the lock", "error", "native", "python"]
    assert ending.endswith(" ended")
    require_gone(int(said.split()[-1]))


def test_streams_that_go_to_the_same_place_keep_their_order(tmp_path: Path) -> None:
    body = 'for n in range(500): os.write(1 + n % 2, b"%d\\n" % n)'
    _, said, _ = run(tmp_path, body, stderr=subprocess.STDOUT)
    lines = [str(n) for n in range(500)]
    assert said.splitlines()[1:-1] == lines
    assert log_path(tmp_path, 1).read_text().splitlines()[2:-1] == lines


def test_a_restart_goes_on_in_the_same_log(tmp_path: Path) -> None:
    run(tmp_path, 'os.write(1, b"cut sho"); os.kill(os.getpid(), 9)')
    read_log(tmp_path, "cut sho")
    run(tmp_path, 'print("second")')
    text = log_path(tmp_path, 1).read_text()
    assert text.count(" rank 1 of 4 on ") == 2
    assert "cut sho\n=== " in text
    assert text.index("cut sho") < text.index("second")


@pytest.mark.parametrize(
    ("last_act", "code"), [("os.kill(os.getpid(), 9)", -signal.SIGKILL), ("os._exit(70)", 70), ("os.abort()", -6)]
)
def test_a_rank_that_ends_at_once_loses_nothing_and_keeps_its_code(last_act: str, code: int, tmp_path: Path) -> None:
    lines = "".join(f"{n:09d}\n" for n in range(5000))  # more than a pipe's worth
    body = f'os.write(2, b"".join(b"%09d\\n" % n for n in range(5000))); print("no flush"); {last_act}'
    found, said, errors = run(tmp_path, body)
    assert found == code
    assert errors == lines
    assert said.endswith("no flush\n")
    read_log(tmp_path, lines, "no flush\n")


def test_an_error_is_in_the_log_and_a_users_one_is_one_line_there(tmp_path: Path) -> None:
    code, _, errors = run(tmp_path, 'raise ValueError("shard 7")')
    assert code == 1
    assert errors.count("Traceback") == 1
    text = log_path(tmp_path, 1).read_text()
    assert " ended by ValueError\nTraceback" in text
    assert text.endswith("ValueError: shard 7\n")
    run(tmp_path / "other", 'raise InputError("x.json: no such field; add it")')
    assert log_path(tmp_path / "other", 1).read_text().endswith(" ended: x.json: no such field; add it\n")


def test_who_does_not_hold_the_run_leaves_no_log(tmp_path: Path) -> None:
    code, said, _ = run(tmp_path, 'raise InputError("refused")', begin="pass")
    assert code == 1
    assert "before the lock" in said
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_the_log_and_nothing_else(tmp_path: Path) -> None:
    log_path(tmp_path, 1).parent.mkdir()
    log_path(tmp_path, 1).symlink_to("/dev/full")
    code, said, errors = run(tmp_path, 'os.write(2, b"x" * 300000)')
    assert code == 0
    assert len(errors) == 300000
    assert "afterwards" in said


def test_a_disk_that_hangs_holds_up_nothing(tmp_path: Path) -> None:
    log_path(tmp_path, 1).parent.mkdir()
    os.mkfifo(log_path(tmp_path, 1))  # to open it for writing waits until somebody reads
    began = time.monotonic()
    code, said, errors = run(tmp_path, 'print("y" * 100); os.write(2, b"x" * 9_000_000)', drain_s=3.0)
    assert code == 0
    assert len(errors) == 9_000_000
    assert time.monotonic() - began < 25, "it waited for the log"
    with open(log_path(tmp_path, 1), "rb") as file:
        text = file.read()
    assert b" rank 1 of 4 on " in text
    assert b"y" * 100 in text
    require_gone(int(said.split()[-1]))


def test_a_log_says_how_much_it_lacks(tmp_path: Path) -> None:
    log_path(tmp_path, 1).parent.mkdir()
    os.mkfifo(log_path(tmp_path, 1))
    body = 'os.write(1, b"x" * 9_000_000); os.write(2, b"!"); sys.stdin.read()'
    process = start(tmp_path, body, drain_s=3.0, stdin=subprocess.PIPE)
    assert process.stderr is not None
    assert process.stdout is not None
    assert len(process.stdout.read(9_000_016)) == 9_000_016  # the relay has seen it all
    with open(log_path(tmp_path, 1), "rb") as file:
        process.communicate("", timeout=60)
        text = file.read()
    assert b" bytes are missing here: the log could not be written]" in text
    assert len(text) < 9_000_000


def kill_the_relay(then: str) -> str:
    """What a killed relay has read and not yet written is gone: it is idle first, and dead before more is printed."""
    return f"rank_logs.drain(); os.kill(pid, 9); log._process.wait()\n    {then}"


def test_a_rank_outlives_its_relay(tmp_path: Path) -> None:
    code, said, errors = run(tmp_path, kill_the_relay("for n in range(3000): print(n); os.write(2, b'z' * 100)"))
    assert code == 0, errors[-2000:]
    expected = "".join(f"{n}\n" for n in range(3000))
    end = re.search(r"afterwards \d+\n", said)
    assert end
    # In another order at most: what is still in the pipes is copied while more is printed.
    assert sorted(said) == sorted("before the lock\n" + expected + end[0])
    assert errors == "z" * 300_000


def test_what_a_killed_relay_had_not_read_is_printed_before_the_rank_ends(tmp_path: Path) -> None:
    stop = "rank_logs.drain(); os.kill(pid, signal.SIGSTOP); os.waitid(os.P_PID, pid, os.WSTOPPED)"
    code, said, errors = run(tmp_path, f"{stop}; print('in the pipe'); os.kill(pid, 9)")
    assert code == 0, errors
    assert said.splitlines()[:2] == ["before the lock", "in the pipe"]


def test_signals_for_the_rank_do_not_end_its_relay(tmp_path: Path) -> None:
    process = start(tmp_path, 'print(pid); print("ready"); sys.stdin.read(); print("on")', stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "before the lock\n"
    pid = int(process.stdout.readline())
    process.stdout.readline()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        os.kill(pid, number)
    process.communicate("", timeout=2 * DRAIN_S)
    assert "\non\n" in log_path(tmp_path, 1).read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_keeps_a_terminal(rank: int, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = start(tmp_path, "print(os.isatty(1), os.isatty(2))", rank, stdout=subprocess.PIPE, stderr=theirs)
    said, _ = process.communicate(timeout=2 * DRAIN_S)
    os.close(ours)
    os.close(theirs)
    assert f"False {rank == 0}" in said
    assert f"False {rank == 0}" in log_path(tmp_path, rank).read_text()


def test_with_stdout_closed_stderr_still_reaches_the_console(tmp_path: Path) -> None:
    code = RANK.format(rank=1, begin=BEGIN, body='os.write(2, b"native\\n")', drain_s=DRAIN_S)
    code = code.replace("print(", "(lambda *_: None)(")
    closed = ["bash", "-c", 'exec "$@" >&-', "closed", sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(closed, cwd=ROOT, capture_output=True, text=True, timeout=2 * DRAIN_S)
    assert (done.returncode, done.stderr) == (0, "native\n")
    assert "native" in read_log(tmp_path, "native")
