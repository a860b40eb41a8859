"""A run of two ranks, watched from outside: what each printed is in its log, and `top` tells who is at work or dead."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llara_dist.supervision.rank_logs import log_path
from tests.runs import ROOT

RANK = """
import os, sys
from pathlib import Path
from llara_dist.cli import main
from llara_dist.training.engine import Engine

train_step = Engine.train_step

def spoken_step(self, step, *arguments, **named):
    print(f"python of rank {self.world.rank} at step {step.index}")
    if self.world.rank == 1 and Path(sys.argv[1]).exists():
        os.write(2, b"last words, past Python's buffers\\n")
        os.kill(os.getpid(), 9)
    return train_step(self, step, *arguments, **named)

Engine.train_step = spoken_step
main(["train", *sys.argv[2:]])
"""


def top(run: Path) -> tuple[str, dict[str, Any]]:
    """What `top --once` prints without a terminal, and its JSON."""
    command = [sys.executable, "-m", "llara_dist.cli", "top", str(run), "--once", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    table, _, last = done.stdout.rstrip().rpartition("\n")
    return table, json.loads(last)


def start(inputs: Path, out: Path, folder: Path) -> list[subprocess.Popen[str]]:
    options = ["--model.path", str(inputs / "llm"), "--data.shards", str(inputs / "shards")]
    options += ["--recommender.path", str(inputs / "rec"), "--out", str(out), "--faults.heartbeat_s", "0.3"]
    options += ["--data.global_batch_samples", "7", "--data.max_tokens_per_microbatch", "600", "--data.epochs", "99"]
    options += ["--data.workers", "0", "--device", "cpu", "--checkpoint.every_steps", "3"]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    given |= {"LLARA_DIST_INIT_METHOD": f"file://{folder}/rendezvous", "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder / "enough"), *options],
            cwd=ROOT,
            env={**given, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]


@pytest.mark.long
def test_a_run_is_watched_while_it_lives_and_after_a_rank_was_killed(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    processes = start(inputs, out, tmp_path)
    try:
        deadline = time.monotonic() + 240
        while not list(out.glob("checkpoints/step-*/complete.json")):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes), processes[0].communicate()
            time.sleep(0.05)
        table, seen = top(out)
        assert seen["state"] == "running"
        assert [rank["rank"] for rank in seen["ranks"]] == [0, 1]
        assert [rank["process"]["pid"] for rank in seen["ranks"]] == [process.pid for process in processes]
        assert seen["checkpoint"] >= 3
        assert seen["step"] >= 3
        assert seen["total_steps"] > 1000
        assert seen["eta_s"] > 0
        for rank in seen["ranks"]:
            assert rank["cost"]["steps"] >= 1
            assert rank["cost"]["compute_s"] > 0
            assert rank["memory_mib"] > 0
            assert rank["mark"] in ("", "slow")
        assert f"{out}  running" in table.replace("\n", "")
        assert re.search(r"step \d+/\d,\d+ \(", table)
        (tmp_path / "enough").touch()
        ended = [(*process.communicate(timeout=240), process.returncode) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert [code for _, _, code in ended] == [70, -signal.SIGKILL]
    deadline = time.monotonic() + 60
    logs = ["", ""]
    while " ended" not in logs[0] or "last words" not in logs[1]:  # a relay may write after its rank has ended
        assert time.monotonic() < deadline, logs
        time.sleep(0.05)
        logs = [log_path(out, rank).read_text() for rank in range(2)]
    for rank, (said, errors, _) in enumerate(ended):
        assert f" rank {rank} of 2 on " in logs[rank].splitlines()[0]
        assert f"python of rank {rank} at step 2\n" in logs[rank]
        assert f"python of rank {1 - rank}" not in logs[rank]
        # The launcher got the same; at the very end the command says on stderr why, which the log tells by itself.
        for line in [*said.splitlines(), *errors.partition("error: ")[0].splitlines()]:
            assert line in logs[rank]
    assert "last words, past Python's buffers\n" in ended[1][1]
    assert "last words, past Python's buffers\n" in logs[1]
    assert " ended" not in logs[1]
    assert "step 1/" in logs[0]
    assert re.search(r" ended: rank 1 of 2 on .* is dead", logs[0])
    table, seen = top(out)
    assert seen["state"] == "1 dead"
    assert [rank["mark"] for rank in seen["ranks"]] == ["stopped", "dead"]
    assert table.splitlines()[-2].split()[0] == "1", "the dead rank comes first"
