"""Where a step is: for the clock, and for whoever watches from outside."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llara_dist.supervision.progress import Phase

Watcher = Callable[[Phase, int, int, list[int]], None]
"""(phase, optimizer step, micro-batch, its sample keys): told of every change of phase by the training thread"""


class Phases:
    """Splits the time of an optimizer step into its phases, without waiting for the GPU.

    On a GPU the phases are marked by events in the stream and read when the step has ended, which it does with a
    synchronisation of its own; on the CPU the clock is read.

    Args:
        device: of the run.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Phase | None, Any]] = []
        self.watcher: Watcher | None = None

    def begin(self) -> None:
        """A step begins: what was marked before is forgotten."""
        self._marks = []

    def enter(self, phase: Phase, step: int, microbatch: int = 0, keys: Tensor | None = None) -> None:
        """The training thread begins a phase; the one before ends.

        Args:
            phase: which.
            step: optimizer step.
            microbatch: of the step, on this rank.
            keys: int64 [N], the samples it works on, on the host.
        """
        self._mark(phase)
        if self.watcher is not None:
            self.watcher(phase, step, microbatch, [] if keys is None else keys.tolist())

    def leave(self) -> None:
        """The last phase ends."""
        self._mark(None)

    def _mark(self, phase: Phase | None) -> None:
        now: Any = time.perf_counter()
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((phase, now))

    def read(self) -> dict[Phase, float]:
        """Seconds by phase since `begin`; waits on a GPU until what was marked is done."""
        marks = self._marks
        if self._cuda and marks:
            marks[-1][1].synchronize()
        seconds: dict[Phase, float] = {}
        for (phase, begin), (_, end) in itertools.pairwise(marks):
            if phase is not None:
                took = begin.elapsed_time(end) / 1000.0 if self._cuda else end - begin
                seconds[phase] = seconds.get(phase, 0.0) + took
        return seconds
