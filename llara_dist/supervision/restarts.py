"""OUT/starts.jsonl: where each start of a run began, on how many ranks; requeueing ends when it leads nowhere."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llara_dist.distributed import Job
from llara_dist.integrity import append_json_line, read_json_lines

STARTS = "starts.jsonl"
IDLE_RESTARTS = 2
"""So many restarts in a row without a step done end the requeueing."""


@dataclass(frozen=True)
class Start:
    """One start of a run.

    Attributes:
        job: scheduler's job; "" without a scheduler.
        restart: how often the scheduler had requeued it.
        first_step: optimizer steps done before it: 0, or its checkpoint's.
        time: local time with zone, for people.
        nodes: ranks of each group that shared rows out among itself: of each node where nodes have their own copies of
            the shards, else one group of all ranks; () in files of older versions.
        max_tokens_per_microbatch: budget of a packed row; 0 in files of older versions.
        kernels: which implementation computed, by field of `KernelsConfig`, without `auto`: some draw other dropout
            masks than others; {} in files of older versions.
    """

    job: str
    restart: int
    first_step: int
    time: str
    nodes: tuple[int, ...] = ()
    max_tokens_per_microbatch: int = 0
    kernels: Mapping[str, str | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """JSON gives a list."""
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "kernels", dict(self.kernels))


def read_starts(out: Path) -> list[Start]:
    """All starts, oldest first; lines that a kill or a full disk tore are left out."""
    starts = []
    for values in read_json_lines(Path(out) / STARTS):
        with contextlib.suppress(TypeError):
            starts.append(Start(**values))
    return starts


def record_start(
    out: Path,
    job: Job,
    first_step: int,
    nodes: Sequence[int] = (),
    max_tokens_per_microbatch: int = 0,
    kernels: Mapping[str, str | bool] | None = None,
) -> None:
    """Append this start, durably; rank 0 calls it once it knows where the run begins.

    Args:
        out: the run's folder.
        job: of this process.
        first_step: optimizer steps done before.
        nodes: as in `Start`.
        max_tokens_per_microbatch: as in `Start`.
        kernels: as in `Start`.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    start = Start(job.name, job.restart, first_step, now, tuple(nodes), max_tokens_per_microbatch, kernels or {})
    append_json_line(Path(out) / STARTS, dataclasses.asdict(start))


def idle_restarts(starts: Sequence[Start], done: int) -> int:
    """How many restarts in a row, the current one last, got no step further.

    A start that does nothing is followed by one at the same step, whether it was told to stop or crashed. Starts of
    another job do not count: someone submitted the run anew. The first start of a run is no restart.

    Args:
        starts: oldest first, the current one last.
        done: optimizer steps that the newest checkpoint holds.
    """
    count = 0
    for earlier, later in zip(starts[-2::-1], starts[:0:-1], strict=True):
        if later.first_step != done or earlier.job != later.job:
            break
        count += 1
    return count


def may_requeue(out: Path, done: int) -> bool:
    """Whether a run that was told to stop should be started again.

    Args:
        out: the run's folder, in which this start is recorded.
        done: optimizer steps that the newest checkpoint holds.
    """
    return idle_restarts(read_starts(out), done) < IDLE_RESTARTS
