"""A torch profiler trace of a few steps, for finding where the time goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import torch

from llara_dist.console import say
from llara_dist.integrity import write_file

WAIT, WARMUP, ACTIVE = 2, 1, 3
"""steps that are let pass, run with the profiler on but not recorded, and recorded"""
ROWS = 30
"""operators in the table"""


class Profiler:
    """Records steps 3 to 5 of a start: OUT/profile/trace.json.gz for Perfetto, OUT/profile/operators.txt to read.

    The first steps are let pass, since they allocate memory and choose kernels. The profiler slows what it records
    down, so the steps' log lines are not what the run costs.

    Args:
        out: the run's folder.
        device: of the run.
        enabled: whether this process records; one rank tells about all, since they do the same.
    """

    def __init__(self, out: Path, device: torch.device, enabled: bool) -> None:
        self._folder = out / "profile"
        self._sort = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        self._profiler: Any = None
        if enabled:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(
                activities=activities,
                schedule=torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
                profile_memory=True,
            )

    def step(self) -> None:
        """An optimizer step has ended."""
        if self._profiler is not None:
            self._profiler.step()

    def _write(self, profiler: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        trace, staging = self._folder / "trace.json.gz", self._folder / ".trace.json.gz"
        profiler.export_chrome_trace(str(staging))
        os.replace(staging, trace)
        table = profiler.key_averages().table(sort_by=self._sort, row_limit=ROWS)
        write_file(self._folder / "operators.txt", table + "\n")
        say(f"profile of {ACTIVE} steps: {trace} (open it at ui.perfetto.dev), {self._folder / 'operators.txt'}")

    def __enter__(self) -> Self:
        if self._profiler is not None:
            self._profiler.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._profiler is not None:
            self._profiler.__exit__(*exception)
