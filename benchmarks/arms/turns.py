"""An arm's process and the benchmark's take turns: one line to begin a step, one line of JSON when it is done."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch


class Stopped(Exception):
    """The benchmark wants no more steps."""


class Turns:
    """The arm's side. What libraries print to standard output goes to standard error from here on.

    Args:
        device: cpu or cuda; a GPU is waited for before a step ends.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._answers: IO[str] = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._begun = False
        self._started = self._cpu = 0.0

    def ready(self, **facts: Any) -> None:
        """The model is there; `facts` go into the result."""
        self._say({"ready": facts})

    def failed(self, reason: str) -> None:
        """This arm does not run here."""
        self._say({"failed": reason})

    def begin(self) -> None:
        """Wait for the turn, then start the clock; a step that was begun and given up is begun again.

        Raises:
            Stopped: there is no further step.
        """
        if not self._begun and sys.stdin.readline().strip() != "step":
            raise Stopped
        self._begun = True
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._started, self._cpu = time.perf_counter(), time.process_time()

    def end(self, **facts: Any) -> None:
        """The step is done; `facts` go with its time."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - self._started, time.process_time() - self._cpu
        self._begun = False
        peak = torch.cuda.max_memory_allocated() if self._cuda else resident_peak()
        self._say({"step": {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak, **facts}})

    def _say(self, message: dict[str, Any]) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


def resident_peak() -> int:
    """The most memory that this process ever held, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Worker:
    """The benchmark's side: one arm in a process of its own.

    Args:
        python: interpreter; a peer may live in a virtual environment of its own.
        arguments: of `benchmarks.arms.worker`.
        environment: of the process.
        log: file that takes what the arm prints.

    Attributes:
        facts: what the arm said when it was ready.
        reason: why it does not run; "" while it does.
    """

    def __init__(self, python: str, arguments: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self.facts: dict[str, Any] = {}
        self.reason = ""
        with log.open("w") as printed:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.arms.worker", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                text=True,
                env=dict(environment),
            )

    def wait_ready(self) -> bool:
        """Wait until it has its model; false where it never will."""
        return self._hear("ready") is not None

    def step(self) -> dict[str, Any] | None:
        """Let it compute one optimizer step; its measurements, or None where it failed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said last tells why
        return self._hear("step")

    def stop(self) -> None:
        """No more steps; wait for its end, or end it: peers may leave threads running."""
        if self.reason:
            self._process.kill()
        else:
            # Not `communicate`: loader processes hold the arm's stdout for five more seconds.
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.wait()

    def _hear(self, kind: str) -> Any:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            message = json.loads(line)
            if "ready" in message:
                self.facts |= message["ready"]
            if "failed" in message:
                self.reason = message["failed"]
                return None
            if kind in message:
                return message[kind]
        last = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        self.reason = f"ended with status {self._process.wait()}: {''.join(last)[:200]}"
        return None
