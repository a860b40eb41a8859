"""The arms' processes: starts them, lets them take turns and keeps what they measured."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.arms.setup import ROOT, Setup
from benchmarks.arms.turns import Worker
from benchmarks.arms.worker import GROUPED, MATRIX, OURS, PEERS, TRAINER
from benchmarks.record import say

OFF = {"attention": "sdpa", "projector": "eager", "lora": "peft", "layers": "torch", "last_layer": "all"}
"""each optimisation switched off"""
LAST_LINES = 25
"""shown of what an arm that fails has printed"""


class Arms:
    """Starts the arms, lets them take turns and keeps what they measured.

    Args:
        setup: the benchmark's.
        peers: interpreter of TRL, Unsloth and LLaMA-Factory.

    Attributes:
        steps: by arm, each timed step's measurements; the warm-up step is left out.
        facts: by arm, what it said when it was ready.
        reasons: by arm, why it did not run.
    """

    def __init__(self, setup: Setup, peers: str) -> None:
        self.setup = setup
        self.steps: dict[str, list[dict[str, Any]]] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.reasons: dict[str, str] = {}
        self._peers = peers
        self._running: dict[str, Worker] = {}

    def measure(self, names: list[str], ablate: bool) -> Iterator[list[str]]:
        """Run the arms; where `ablate`, also the variants of ours that differ from what it chose, and one peer's.

        Yields:
            The arms to come, whenever the others have been timed equally often: after each arm, on a CPU each round.

        Raises:
            SystemExit: what all else is compared with does not run.
        """
        together = self.setup.device == "cpu"
        waiting, running = list(names), []
        while waiting:
            name = waiting.pop(0)
            if self._start(name):
                running.append(name)
                if name == OURS and ablate:
                    chosen = self.facts[OURS]["kernels"]
                    waiting[:0] = [f"{OURS}, {field}={off}" for field, off in OFF.items() if chosen[field] != off]
                if name == TRAINER and ablate:
                    waiting.insert(0, GROUPED)
            if together and waiting:
                continue
            for turn in range(self.setup.steps - 1):
                first = turn % max(1, len(running))
                for each in running[first:] + running[:first]:
                    measured = self._step(each)
                    if measured is not None:
                        self.steps[each].append(measured)
                if together:
                    yield []
            while running:
                self._stop(running.pop())
            if not together and self.steps.get(OURS):
                yield list(waiting)

    def _start(self, name: str) -> bool:
        """Start an arm and let it warm up on one step."""
        say(f"{name}: starting")
        python = self._peers if name in PEERS else sys.executable
        # What else is on our path belongs to our interpreter.
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")] if python == sys.executable else [])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "OMP_NUM_THREADS": str(self.setup.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "DS_ACCELERATOR": self.setup.device,
        }
        if self.setup.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        log = Path(self.setup.scratch) / f"{len(self.facts)}.log"
        worker = Worker(python, [name, self.setup.write()], environment, log)
        self._running[name], self.steps[name] = worker, []
        if not worker.wait_ready():
            self._failed(name)
        alive = self._step(name) is not None
        self.facts[name] = worker.facts
        if not alive:
            self._stop(name)
        return alive

    def _step(self, name: str) -> dict[str, Any] | None:
        worker = self._running[name]
        if worker.reason:
            return None
        measured = worker.step()
        if measured is None:
            self._failed(name)
        else:
            say(f"{name}: {measured['seconds']:.2f} s")
        return measured

    def _failed(self, name: str) -> None:
        """Note why, and show the end of what the arm printed, which is gone with the scratch folder."""
        worker = self._running[name]
        self.reasons[name] = worker.reason
        printed = worker.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        say("\n".join([*printed, f"{name}: does not run here: {worker.reason}"]))
        if name in (MATRIX, OURS):
            raise SystemExit(f"{name} does not run: there is nothing to compare with")

    def _stop(self, name: str) -> None:
        self._running.pop(name).stop()
