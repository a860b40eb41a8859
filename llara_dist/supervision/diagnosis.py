"""From all ranks' status files to the one that is to blame: pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from llara_dist.supervision.rank_status import KILLED, RankRecord

RANKS_NAMED = 8


@dataclass(frozen=True)
class Watched:
    """A rank as seen over some heartbeats.

    Attributes:
        record: its newest status file.
        moved: whether its heartbeat moved while it was watched.
        running: whether its process lives; None = not known from here.
    """

    record: RankRecord
    moved: bool
    running: bool | None

    @property
    def is_settled(self) -> bool:
        """Whether watching it longer would tell nothing new."""
        return self.moved or self.record.ended is not None or self.running is False


@dataclass(frozen=True)
class Diagnosis:
    """What keeps a run from going on. Ranks are in ascending order.

    Attributes:
        failed: ended by an error of their own.
        dead: their process is gone without a word.
        silent: no heartbeat, and nothing more is known from here: another host.
        missing: wrote no status in this start.
        finished: ended in order, while others still work.
        behind: alive, at the earliest place of all that are alive, while others are further or wait in a collective at
            the same place; also a rank that is the only one.
        waiting: alive and further; every living rank where all stand at the same place.
        watched_s: for how long heartbeats were watched.
    """

    failed: tuple[RankRecord, ...]
    dead: tuple[RankRecord, ...]
    silent: tuple[RankRecord, ...]
    missing: tuple[int, ...]
    finished: tuple[RankRecord, ...]
    behind: tuple[RankRecord, ...]
    waiting: tuple[RankRecord, ...]
    watched_s: float

    @property
    def is_rank_gone(self) -> bool:
        """Whether a rank that this run needs takes part no more."""
        return bool(self.failed or self.dead or self.silent)

    def lines(self, stacks: str) -> list[str]:
        """What a person reads: who is to blame first, then who waits for them.

        Args:
            stacks: where the ranks that could still write their stacks wrote them.
        """
        said = [f"{r.name} failed: {r.ended}; last seen in {r.last_seen}" for r in self.failed]
        said += [
            f"{r.name} is dead: its process ended without a word, as when it is killed; last seen in {r.last_seen}"
            for r in self.dead
        ]
        said += [
            f"{r.name} is silent: no sign of life while watched for {self.watched_s:.1f} s, the last at "
            f"{r.written_at} (killed, suspended, its node lost, or stuck in a call that lets no other thread run); "
            f"last seen in {r.last_seen}"
            for r in self.silent
        ]
        if self.missing:
            said.append(f"ranks that never gave a sign of life: {ranges(self.missing)}")
        if not self.is_rank_gone and self.behind:
            said += [
                f"{r.name} hangs: no progress for {r.idle_s:.0f} s in {r.last_seen}" for r in self.behind[:RANKS_NAMED]
            ]
            if len(self.behind) > RANKS_NAMED:
                said.append(f"so do ranks {ranges(r.rank for r in self.behind[RANKS_NAMED:])}")
        elif not self.is_rank_gone and self.waiting:
            first = self.waiting[0].progress
            said.append(
                f"all ranks stand in {first.place}, none is behind: a collective does not complete (network, device), "
                "or every rank hangs at the same place"
            )
        if self.finished:
            said.append(f"ranks that had ended in order: {ranges(r.rank for r in self.finished)}")
        alive = [*self.waiting, *(self.behind if self.is_rank_gone else ())]
        places = sorted({r.progress.position: r.progress.place for r in alive}.items())
        for position, place in places:
            ranks = ranges(r.rank for r in alive if r.progress.position == position)
            said.append(f"in {place}: ranks {ranks}")
        return [*said, f"stacks: {stacks}"]


def diagnose(watched: Mapping[int, Watched], world_size: int, watched_s: float) -> Diagnosis:
    """Sort the ranks of a run that does not get on.

    Args:
        watched: by rank; who wrote no status in this start is missing from it.
        world_size: number of ranks.
        watched_s: for how long heartbeats were watched.
    """
    ended = [w.record for w in watched.values() if w.record.ended is not None]
    open_ended = [w for w in watched.values() if w.record.ended is None]
    killed = [r for r in ended if r.ended == KILLED]
    gone = [w for w in open_ended if not w.moved or w.running is False]
    alive = [w.record for w in open_ended if w.moved and w.running is not False]
    earliest = min((r.progress.position for r in alive), default=None)
    behind = [r for r in alive if r.progress.position == earliest]
    if len(behind) == len(alive) > 1:
        # All at the same place: it is who computes, while others already wait in a collective; else nobody.
        outside = [r for r in alive if not r.in_collective]
        behind = outside if len(outside) < len(alive) else []
    return Diagnosis(
        failed=_ascending(r for r in ended if r.has_failed),
        dead=_ascending([*killed, *(w.record for w in gone if w.running is False)]),
        silent=_ascending(w.record for w in gone if w.running is not False),
        missing=tuple(sorted(set(range(world_size)) - watched.keys())),
        finished=_ascending(r for r in ended if r.ended == ""),
        behind=_ascending(behind),
        waiting=_ascending(r for r in alive if r not in behind),
        watched_s=watched_s,
    )


def _ascending(records: Iterable[RankRecord]) -> tuple[RankRecord, ...]:
    return tuple(sorted(records, key=lambda record: record.rank))


def ranges(ranks: Iterable[int]) -> str:
    """Ranks as people write them: "0–2, 4, 6–7"."""
    ordered: Sequence[int] = sorted(ranks)
    members: AbstractSet[int] = set(ordered)
    starts = [rank for rank in ordered if rank - 1 not in members]
    ends = [rank for rank in ordered if rank + 1 not in members]
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True))
