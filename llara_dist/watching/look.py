"""What a run's folder says of the run at a moment, and how that moved since it was first looked at."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llara_dist.errors import InputError
from llara_dist.supervision.heartbeat import silence_s
from llara_dist.supervision.rank_status import RankRecord, read_status, read_statuses
from llara_dist.supervision.run_lock import LockRecord, parse_lock
from llara_dist.training.checkpoints.folders import newest_step
from llara_dist.training.pace import ROWS, Pace
from llara_dist.watching.marks import Judged, Mark, Seen, judge, state_of

_TAIL = 1 << 16
_READS = 5
"""a status file is read at most so many times for each time that it is written"""
_SHORTEST_WAIT_S = 0.2


@dataclass(frozen=True)
class View:
    """A run at a moment.

    Attributes:
        run: its folder.
        state: in a few words.
        lock: who holds or held it; None = nobody yet.
        ranks: all that wrote a status in this start, those that stand out first.
        missing: ranks that wrote none.
        total_steps: T; 0 = not known yet.
        row: the newest of metrics.jsonl.
        pace: of its newest rows; None where there are none.
        saved: steps in the newest checkpoint.
        best: scores of the best checkpoint.
        validation: the newest of validation.jsonl.
    """

    run: Path
    state: str
    lock: LockRecord | None
    ranks: tuple[Judged, ...]
    missing: tuple[int, ...]
    total_steps: int
    row: dict[str, Any] | None
    pace: Pace | None
    saved: int | None
    best: dict[str, Any] | None
    validation: dict[str, Any] | None

    @property
    def done(self) -> int:
        """Optimizer steps done, as far as they are logged."""
        return 0 if self.row is None else self.row["step"] + 1

    @property
    def is_over(self) -> bool:
        """Whether no rank is at work, as far as can be told."""
        return all(each.record.ended is not None or each.mark.is_trouble for each in self.ranks)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        left_s = None if self.pace is None or not self.total_steps else self.pace.left_s(self.done, self.total_steps)
        ranks = [
            asdict(each.record) | {"mark": str(each.mark), "much": each.much, "still_s": round(each.seen.still_s, 1)}
            for each in sorted(self.ranks, key=lambda each: each.record.rank)
        ]
        return {
            "run": str(self.run),
            "state": self.state,
            "job": None if self.lock is None else asdict(self.lock.job),
            "host": None if self.lock is None else self.lock.process.host,
            "step": self.done,
            "total_steps": self.total_steps,
            "eta_s": left_s,
            "pace": None if self.pace is None else asdict(self.pace),
            "newest": self.row,
            "checkpoint": self.saved,
            "best": self.best,
            "validation": self.validation,
            "missing_ranks": list(self.missing),
            "ranks": ranks,
        }


class Watch:
    """Looks at a run again and again. Heartbeats are counters: whether a rank lives is seen by watching them move.

    Of a large run the ranks' files are not read at every look: that would cost its file system more than the run does.

    Args:
        run: the run's folder.
        clock: seconds, monotonic.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(self, run: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._clock = Path(run), clock
        self._heartbeats: dict[tuple[str, int], tuple[int, float, bool]] = {}
        self._records: list[RankRecord] = []
        self._read_at = -math.inf
        if not self._run.is_dir():
            raise InputError(f"{run}: no such folder; give the --out of a run")

    def look(self) -> View:
        """The run as it is now."""
        now = self._clock()
        if now - self._read_at >= _interval_s(self._records) / _READS:
            self._records, self._read_at = read_statuses(self._run), now
        return self._view([self._seen(record, now) for record in self._records])

    def look_until_settled(self) -> View:
        """The run once every rank that works was seen to, or was watched for so long that it is silent."""
        now = self._clock()
        seen = {record.rank: self._seen(record, now) for record in read_statuses(self._run)}
        wait_s = max(_SHORTEST_WAIT_S, _interval_s([each.record for each in seen.values()]) / _READS)
        while unsettled := [each.record for each in _judge(seen.values()) if not _is_settled(each)]:
            time.sleep(wait_s)
            now = self._clock()
            for known in unsettled:  # the others stay as they were seen
                record = read_status(self._run, known.rank, known.token) or known
                seen[known.rank] = self._seen(record, now)
        return self._view(seen.values())

    def _view(self, seen: Collection[Seen]) -> View:
        records = [each.record for each in seen]
        judged = _judge(seen)
        world_size = max((record.world_size for record in records), default=0)
        missing = tuple(sorted(set(range(world_size)) - {record.rank for record in records}))
        rows = tail(self._run / "metrics.jsonl")
        saved = newest_step(self._run / "checkpoints")
        validations = tail(self._run / "validation.jsonl")
        return View(
            run=self._run,
            state=state_of(judged, len(missing), saved),
            lock=newest_lock(self._run),
            ranks=tuple(judged),
            missing=missing,
            total_steps=max((record.total_steps for record in records), default=0),
            row=rows[-1] if rows else None,
            pace=_pace(rows[-ROWS:]),
            saved=saved,
            best=_read_object(self._run / "checkpoints" / "best.json"),
            validation=validations[-1] if validations else None,
        )

    def _seen(self, record: RankRecord, now: float) -> Seen:
        key = (record.token, record.rank)
        heartbeat, since, moved = self._heartbeats.get(key, (record.heartbeat, now, False))
        if heartbeat != record.heartbeat:
            heartbeat, since, moved = record.heartbeat, now, True
        self._heartbeats[key] = (heartbeat, since, moved)
        return Seen(record, now - since, moved, record.process.is_running())


def _interval_s(records: Iterable[RankRecord]) -> float:
    return max((record.interval_s for record in records), default=0.0)


def _judge(seen: Collection[Seen]) -> list[Judged]:
    return judge(list(seen), silence_s(_interval_s(each.record for each in seen)))


def _is_settled(rank: Judged) -> bool:
    """Whether watching it longer would tell nothing new; one that seems stuck may as well be of a run long dead."""
    return rank.seen.moved or rank.record.ended is not None or rank.mark in (Mark.DEAD, Mark.SILENT)


def tail(path: Path) -> list[dict[str, Any]]:
    """The newest rows of a log of JSON lines, oldest first; what is cut short at either end is left out."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def newest_lock(run: Path) -> LockRecord | None:
    """Who holds the run, or held it last."""
    try:
        return parse_lock(max(run.glob("lock-*.json")).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _pace(rows: list[dict[str, Any]]) -> Pace | None:
    try:
        return Pace.of(rows) if rows else None
    except KeyError:  # of an older version
        return None
