"""What a rank is doing: in memory for the loop, in OUT/ranks/rank-00017.json for everybody else."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from llara_dist.supervision.heartbeat import replace_text
from llara_dist.supervision.process_identity import ProcessIdentity
from llara_dist.supervision.progress import KEYS_SHOWN, Phase, Progress
from llara_dist.supervision.shared_place import SharedPlace
from llara_dist.supervision.step_clock import StepClock, StepCost

RANKS = "ranks"
WRITES_PER_S = 100.0
"""Most status files a second that all ranks together write."""
STOPPED = "stopped because of another rank"
"""How a rank ended that was itself in order."""
KILLED = "killed"
"""How a rank ended that could not say so itself; another rank of its host wrote it."""


class RankStatus:
    """This rank's progress, set by the main thread, read by the thread that reports it.

    Setting it is one assignment of an immutable value and a few words of memory: no lock, no system call.

    Attributes:
        total_steps: T; 0 while it is not known.
        memory: tells the MiB that this process needed at most, on its device; called by the reporting thread. None
            while nobody can tell.
    """

    def __init__(self) -> None:
        self.total_steps = 0
        self.memory: Callable[[], float] | None = None
        self._state = (Progress(), 0, time.monotonic())
        self._clock = StepClock()
        self._shared: SharedPlace | None = None

    def share(self, place: SharedPlace | None) -> None:
        """From now on write every change to `place` as well; None ends that."""
        self._shared = place
        if place is not None:
            place.write(self.progress)

    def enter(self, phase: Phase, step: int = -1, microbatch: int = 0, keys: Iterable[int] = ()) -> None:
        """A phase begins.

        Args:
            phase: which.
            step: optimizer step, 0-based.
            microbatch: of this rank in the step, 0-based.
            keys: sample keys of the micro-batch; integers on the host, never tensors on a device.
        """
        known = tuple(keys)
        shown = tuple(int(key) for key in known[:KEYS_SHOWN])
        progress, now = Progress(phase, step, microbatch, shown, len(known)), time.monotonic()
        self._state = (progress, self._state[1] + 1, now)
        self._clock.enter(phase, now, len(known))
        if self._shared is not None:
            self._shared.write(progress)

    def touch(self) -> None:
        """There is progress within the phase."""
        progress, changes, _ = self._state
        self._state = (progress, changes + 1, time.monotonic())

    @property
    def progress(self) -> Progress:
        """Where the rank stands."""
        return self._state[0]

    @property
    def cost(self) -> StepCost | None:
        """What the steps cost lately; None before the first one has ended."""
        return self._clock.cost

    def read(self) -> tuple[Progress, int, float]:
        """Where the rank stands, how often that changed, and seconds since it last did; all of one moment."""
        progress, changes, since = self._state
        return progress, changes, time.monotonic() - since


@dataclass(frozen=True)
class RankRecord:
    """A rank's status file.

    Attributes:
        token: of the start; a file of another start says nothing about this one.
        rank: which.
        world_size: number of ranks.
        process: of the rank.
        heartbeat: counts up with every write.
        interval_s: seconds between writes.
        progress: where it stands.
        changes: how often `progress` was set.
        idle_s: seconds since that was last done, by the rank's own clock.
        in_collective: whether a thread stands in a collective, as seen once it is without progress for a heartbeat.
        ended: None while it works, "" once it ended in order, STOPPED, KILLED, else the error that ended it.
        written_at: local time with zone, for people.
        total_steps: T; 0 = not known yet.
        cost: of a step on this rank; None before the first one has ended.
        memory_mib: what the process needed at most, on its device; None = not known yet.
    """

    token: str
    rank: int
    world_size: int
    process: ProcessIdentity
    heartbeat: int
    interval_s: float
    progress: Progress
    changes: int
    idle_s: float
    in_collective: bool
    ended: str | None
    written_at: str
    total_steps: int = 0
    cost: StepCost | None = None
    memory_mib: float | None = None

    @property
    def has_failed(self) -> bool:
        """Whether an error of its own ended it."""
        return self.ended not in (None, "", STOPPED, KILLED)

    @property
    def name(self) -> str:
        """The rank as messages name it."""
        return f"rank {self.rank} of {self.world_size} on {self.process.host} (pid {self.process.pid})"

    @property
    def last_seen(self) -> str:
        """Place and samples."""
        samples = self.progress.samples
        return self.progress.place + (f", {samples}" if samples else "")

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(dataclasses.asdict(self)) + "\n"


def parse_status(text: str) -> RankRecord | None:
    """A status file's record; None where the text is none."""
    try:
        values = json.loads(text)
        progress = values.pop("progress")
        phase, keys = Phase(progress.pop("phase")), tuple(progress.pop("keys"))
        process = ProcessIdentity(**values.pop("process"))
        cost = values.pop("cost", None)
        return RankRecord(
            **values,
            process=process,
            progress=Progress(**progress, phase=phase, keys=keys),
            cost=None if cost is None else StepCost(**cost),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def status_path(out: Path, rank: int) -> Path:
    """A rank's status file."""
    return Path(out) / RANKS / f"rank-{rank:05d}.json"


def read_status(out: Path, rank: int, token: str) -> RankRecord | None:
    """A rank's record of this start; None where it wrote none yet, or the file system does not show it."""
    try:
        record = parse_status(status_path(out, rank).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return record if record is not None and record.token == token else None


def write_status(out: Path, record: RankRecord) -> None:
    """Write a rank's file: its own, or that of a rank that was killed."""
    path = status_path(out, record.rank)
    replace_text(
        path, record.to_json(), path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.staging")
    )


def read_statuses(out: Path) -> list[RankRecord]:
    """Every rank's record of the newest start, in rank order; the newest is rank 0's."""
    records = []
    for path in sorted((Path(out) / RANKS).glob("rank-*.json")):
        try:
            record = parse_status(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
        if record is not None and record.token == (records[0].token if records else record.token):
            records.append(record)
    return records


def beats_per_write(world_size: int, heartbeat_s: float) -> int:
    """Every how many heartbeats a rank writes its file, so that all of them together are gentle on the file system.

    Up to 100 files a second are written whatever the number of ranks: with heartbeats of 5 s each of 500 ranks writes
    at every one, each of 1,024 at every third.
    """
    return max(1, math.ceil(world_size / (WRITES_PER_S * heartbeat_s)))
