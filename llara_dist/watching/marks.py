"""Which ranks of a run stand out, and what state the run is in: pure functions of what was seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from llara_dist.supervision.progress import Phase
from llara_dist.supervision.rank_status import KILLED, STOPPED, RankRecord

SLOW = 1.25
"""a rank is slow that needs so many times as long as the median for data, forward and backward"""
_LEAST_STEPS = 3
_STUCK_STEPS = 5
_FIRST_STEP_S = 300.0
"""while no rank has ended a step, nobody knows how long one takes: first fetch, first forward, kernels compiled"""


class Mark(StrEnum):
    """How a rank stands out, the worst first.

    failed: by an error of its own. dead: its process is gone. silent: no sign of life. stuck: alive, without progress,
    and nobody is behind it. slow: lately took longer than the others. waits: for long, in a collective or for a rank
    that is behind. stopped: because of another rank.
    """

    FAILED = "failed"
    DEAD = "dead"
    SILENT = "silent"
    STUCK = "stuck"
    SLOW = "slow"
    WAITS = "waits"
    STOPPED = "stopped"
    NONE = ""

    @property
    def is_trouble(self) -> bool:
        """Whether the run cannot go on like this."""
        return self in (Mark.FAILED, Mark.DEAD, Mark.SILENT, Mark.STUCK)


@dataclass(frozen=True)
class Seen:
    """A rank as it was watched.

    Attributes:
        record: its newest status file.
        still_s: seconds for which its heartbeat has not moved while it was watched.
        moved: whether it ever did.
        running: whether its process lives; None = not known from here.
    """

    record: RankRecord
    still_s: float
    moved: bool
    running: bool | None


@dataclass(frozen=True)
class Judged:
    """A rank and how it stands out.

    Attributes:
        seen: as watched.
        mark: how.
        much: how much: "42 s", "1.7×"; "" where nothing is counted.
    """

    seen: Seen
    mark: Mark
    much: str = ""

    @property
    def record(self) -> RankRecord:
        """Its newest status file."""
        return self.seen.record

    @property
    def short(self) -> str:
        """The mark and how much of it; "" where it does not stand out."""
        return f"{self.mark} {self.much}".strip()


def judge(ranks: Sequence[Seen], silence_s: float) -> list[Judged]:
    """Mark the ranks that stand out; those come first, the worst before the others, then in rank order.

    Args:
        ranks: all that are known.
        silence_s: a heartbeat that stands still for longer means that the rank is silent.
    """
    costs = [seen.record.cost for seen in ranks if seen.record.cost is not None]
    usual_s = median(cost.wait_s + cost.compute_s for cost in costs) if len(costs) > 1 else 0.0
    idle_limit_s = _STUCK_STEPS * median(cost.whole_s for cost in costs) if costs else _FIRST_STEP_S
    # NCCL's collectives are asynchronous: on GPUs who waits is known by who is behind, and not by its stack.
    places = (seen.record.progress.position for seen in ranks if seen.record.ended != "")
    earliest = min(places, default=(0, 0, 0, 0))
    judged = [Judged(seen, *_mark(seen, silence_s, usual_s, idle_limit_s, earliest)) for seen in ranks]
    worst = list(Mark)
    return sorted(judged, key=lambda each: (worst.index(each.mark), each.record.rank))


def _mark(
    seen: Seen, silence_s: float, usual_s: float, idle_limit_s: float, earliest: tuple[int, int, int, int]
) -> tuple[Mark, str]:
    record = seen.record
    if record.has_failed:
        return Mark.FAILED, ""
    if record.ended == KILLED or (record.ended is None and seen.running is False):
        return Mark.DEAD, ""
    if record.ended is not None:
        return Mark.STOPPED if record.ended == STOPPED else Mark.NONE, ""
    if seen.still_s > silence_s:
        return Mark.SILENT, f"{seen.still_s:.0f} s"
    if record.progress.phase.is_limited and record.idle_s > max(2 * record.interval_s, idle_limit_s):
        waits = record.in_collective or record.progress.position > earliest
        return Mark.WAITS if waits else Mark.STUCK, f"{record.idle_s:.0f} s"
    cost = record.cost
    if cost is not None and cost.steps >= _LEAST_STEPS and usual_s > 0:
        own_s = cost.wait_s + cost.compute_s
        if own_s > SLOW * usual_s:
            return Mark.SLOW, f"{own_s / usual_s:.1f}×"
    return Mark.NONE, ""


def state_of(ranks: Sequence[Judged], missing: int, saved: int | None) -> str:
    """What the run is doing, in a few words.

    Args:
        ranks: all that are known.
        missing: how many ranks have said nothing in this start.
        saved: steps that the newest checkpoint holds; None = there is none.
    """
    if not ranks:
        return "not started"
    count = {mark: sum(each.mark is mark for each in ranks) for mark in Mark}
    trouble = ", ".join(f"{count[mark]} {mark}" for mark in Mark if mark.is_trouble and count[mark])
    working = [each for each in ranks if each.record.ended is None and not each.mark.is_trouble]
    if working and trouble:
        return f"in trouble: {trouble}"
    if working:
        if all(each.mark is Mark.WAITS for each in working):
            return "stands still: every rank waits in a collective"
        phases = {each.record.progress.phase for each in working}
        if phases & {Phase.STARTING, Phase.LOADING} or missing:
            return f"starting: {missing} of {missing + len(ranks)} ranks to come" if missing else "starting"
        common = phases.pop() if len(phases) == 1 else None
        return f"running: {common}" if common in (Phase.VALIDATION, Phase.CHECKPOINT) else "running"
    if trouble:
        return trouble if len(ranks) > 1 else next(str(mark) for mark in Mark if count[mark])
    total = ranks[0].record.total_steps
    if saved is not None and 0 < total <= saved:
        return "finished"
    return "ended" if saved is None else f"ended; saved up to step {saved:,}"
