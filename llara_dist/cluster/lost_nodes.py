"""From the status files of a start that has ended to the nodes that a job had better not get again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from llara_dist.distributed import Job
from llara_dist.supervision.diagnosis import Watched, diagnose
from llara_dist.supervision.early_end import EarlyEnd
from llara_dist.supervision.rank_status import STOPPED, RankRecord, read_statuses
from llara_dist.supervision.run_lock import parse_lock

LARGEST_SHARE = 4
"""At most one in so many of a partition's nodes is excluded by a job: what follows it over more is not the nodes'."""


def records_of_start(out: Path, job: Job) -> list[RankRecord]:
    """Every rank's last word in this start of this job; empty where it did not get as far as to take the run's lock.

    Args:
        out: the run's folder.
        job: with the restart that is meant; its step is not looked at.
    """
    for path in sorted(out.glob("lock-*.json"), reverse=True):
        try:
            lock = parse_lock(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
        if lock is None or (lock.job.name, lock.job.restart) != (job.name, job.restart):
            return []
        return [record for record in read_statuses(out) if record.token == lock.token]
    return []


def ranks_to_blame(records: Sequence[RankRecord]) -> list[int]:
    """The ranks because of which a start ended, once all its processes are gone: who failed, died, fell silent or hung.

    A rank that stopped because of another one could still say so, and where it then stood; who said nothing was killed,
    suspended, cut off, or had to be killed. Where all could say so, the one that is behind held up the others.

    Args:
        records: of one start.
    """
    if not records:
        return []
    watched = {}
    for record in records:
        living = dataclasses.replace(record, ended=None) if record.ended == STOPPED else record
        watched[record.rank] = Watched(living, moved=record.ended is not None, running=None)
    found = diagnose(watched, records[0].world_size, watched_s=0.0)
    gone = {record.rank for record in (*found.failed, *found.dead, *found.silent)} | set(found.missing)
    return sorted(gone or {record.rank for record in found.behind})


def nodes_of(ranks: Iterable[int], hosts: Mapping[int, str], world_size: int, nodes: Sequence[str]) -> list[str]:
    """The nodes that ranks ran on, by the host names they gave, else by their order, which is the nodes'.

    Args:
        ranks: which.
        hosts: by rank; one may be missing.
        world_size: number of ranks.
        nodes: of the job, in Slurm's order.
    """
    by_short_name = {node.partition(".")[0]: node for node in nodes}
    found = {
        by_short_name.get(
            hosts.get(rank, "").partition(".")[0], nodes[min(rank * len(nodes) // world_size, len(nodes) - 1)]
        )
        for rank in ranks
    }
    return [node for node in nodes if node in found]


def nodes_at_fault(records: Sequence[RankRecord], nodes: Sequence[str]) -> list[str]:
    """The nodes of the ranks because of which a start ended.

    Args:
        records: of one start.
        nodes: of the job, in Slurm's order.
    """
    if not records:
        return []
    hosts = {record.rank: record.process.host for record in records}
    return nodes_of(ranks_to_blame(records), hosts, records[0].world_size, nodes)


def nodes_that_failed_alone(ends: Sequence[EarlyEnd], nodes: Sequence[str]) -> list[str]:
    """The nodes whose ranks ended before the run had begun, where that is their own affair.

    It is not where one of these ranks says that another may find the same, nor where all nodes have one.

    Args:
        ends: of one start.
        nodes: of the job, in Slurm's order.
    """
    if not ends or any(end.everywhere for end in ends):
        return []
    hosts = {end.rank: end.host for end in ends}
    failed = nodes_of(hosts, hosts, ends[0].world_size, nodes)
    return [] if len(failed) == len(nodes) else failed


def nodes_to_exclude(
    blamed: Sequence[str], nodes: Sequence[str], usable: AbstractSet[str], ours: AbstractSet[str]
) -> list[str]:
    """The blamed nodes, where the job can do without them and still starts; else none.

    None either where every node of several is blamed, which says nothing of any.

    Args:
        blamed: of the job's nodes, without those that it asked for by name.
        nodes: that the job had.
        usable: of its partition, without those that it must not have.
        ours: that the job has excluded itself.
    """
    if len(blamed) == len(nodes) > 1:
        return []
    new = [node for node in blamed if node not in ours]
    left = usable - set(blamed)
    most = max(1, len(usable | ours | set(nodes)) // LARGEST_SHARE)
    return new if len(left) >= len(nodes) and len(ours) + len(new) <= most else []
