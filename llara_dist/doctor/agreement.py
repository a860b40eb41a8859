"""What the nodes of a job must have in common, judged from what each of its ranks said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llara_dist.doctor.network import check_reduction
from llara_dist.doctor.verdicts import error, passed, warning
from llara_dist.errors import Finding

SKEW_S = 5.0
"""difference of two clocks that makes logs hard to read and files look old"""
LATE_S = 3.0
"""after which seeing another node's file is worth a warning"""


def check_all(
    ranks: Mapping[int, Mapping[str, Any]], tried: Mapping[int, Mapping[str, Any]], go: Mapping[str, Any]
) -> list[Finding]:
    """Every check.

    Args:
        ranks: by rank host, local_rank, code and versions (of a node's first rank).
        tried: by rank clock, gpu, gpus, seen_after_s (of a node's first rank), and what gloo and NCCL gave.
        go: the file that was to be seen (token), or why it was not written (problem).
    """
    hosts = {rank: place["host"] for rank, place in ranks.items()}
    first = {rank: place for rank, place in ranks.items() if place["local_rank"] == 0}
    nodes = len(set(hosts.values()))
    findings = [passed("ranks", f"{len(ranks)} on {nodes} node{'s' * (nodes > 1)}")]
    silent = [rank for rank in hosts if rank not in tried]
    if silent:
        found = f"{_where(silent, hosts)} fell silent while folder and collectives were tried"
        findings.append(error("ranks", found, "look at these nodes: their file system or network hangs"))
    return [
        *findings,
        *check_places([{**ranks[rank], **results} for rank, results in sorted(tried.items())]),
        *check_equal("code", {hosts[rank]: place["code"] for rank, place in first.items()}),
        *check_equal("versions", {hosts[rank]: place["versions"] for rank, place in first.items()}),
        *check_clocks({hosts[rank]: tried[rank]["clock"] for rank in first if rank in tried}),
        *check_shared(go, {hosts[rank]: tried[rank]["seen_after_s"] for rank in first if rank in tried}),
        *(finding for backend in ("gloo", "nccl") for finding in check_backend(backend, tried, hosts)),
    ]


def _where(ranks: Sequence[int], hosts: Mapping[int, str]) -> str:
    shown = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:4])
    return shown + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")


def check_places(ranks: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Every node has as many ranks and GPUs as the others; every rank has a GPU of its own, or none has.

    Args:
        ranks: of each host, local_rank, gpus (that it sees) and gpu (its own).
    """
    by_host: dict[str, list[Mapping[str, Any]]] = {}
    for place in ranks:
        by_host.setdefault(place["host"], []).append(place)
    for host, places in by_host.items():
        local = sorted(place["local_rank"] for place in places)
        if len(set(local)) < len(local):
            found = f"{host}: several ranks have local rank {next(n for n in local if local.count(n) > 1)}"
            return [error("places", found, "give every node a host name of its own")]
        chips = [place["gpu"] for place in places if place["gpu"]]
        if chips and (len(set(chips)) < len(places) or "none of its own" in chips):
            found = f"{host}: {len(places)} ranks share {len(set(chips) - {'none of its own'})} GPUs"
            return [error("places", found, "start as many ranks a node as it has GPUs")]
    findings = []
    for what, of in (("ranks", len), ("GPUs", lambda places: max(place["gpus"] for place in places))):
        counts = {host: of(places) for host, places in by_host.items()}
        if len(set(counts.values())) > 1:
            remedy = "use nodes that are alike" if what == "GPUs" else "start equally many on each"
            severity = error if what == "GPUs" and 0 in counts.values() else warning
            findings.append(severity("places", f"{what} a node differ: {_groups(counts, str)}", remedy))
    if not findings:
        places = next(iter(by_host.values()))
        gpus = f", {places[0]['gpus']} GPUs visible" if places[0]["gpus"] else ", no GPU"
        findings.append(passed("places", f"{len(places)} rank{'s' * (len(places) > 1)} on each{gpus}"))
    return findings


def _groups(by_host: Mapping[str, Any], shown: Callable[[Any], str]) -> str:
    """Hosts by what they have, rarest first: "2.11.0 on node-b; 2.13.0 on 7 others"."""
    groups: dict[str, list[str]] = {}
    for host, value in by_host.items():
        groups.setdefault(shown(value), []).append(host)
    ordered = sorted(groups.items(), key=lambda group: len(group[1]))
    return "; ".join(
        f"{value} on {', '.join(hosts[:3])}{f' and {len(hosts) - 3} more' if len(hosts) > 3 else ''}"
        for value, hosts in ordered
    )


def check_equal(check: str, by_host: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """All nodes run the same code, or the same versions of libraries."""
    names = sorted({name for values in by_host.values() for name in values})
    different = [name for name in names if len({str(values.get(name)) for values in by_host.values()}) > 1]
    if not different:
        return [passed(check, "the same on every node")]
    return [
        error(
            check,
            f"{name} differs: {_groups({host: values.get(name) for host, values in by_host.items()}, _short)}",
            "install or check out the same on every node; best from one shared folder",
        )
        for name in different
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 40 else text


def check_clocks(clocks: Mapping[str, float]) -> list[Finding]:
    """The nodes' clocks agree; they were read at about the same moment (seconds since the epoch, by host)."""
    if len(clocks) < 2:
        return []
    early, late = min(clocks, key=clocks.__getitem__), max(clocks, key=clocks.__getitem__)
    skew = clocks[late] - clocks[early]
    if skew > SKEW_S:
        found = f"{late} is {skew:.0f} s ahead of {early}"
        return [warning("clocks", found, "have them synchronised (chrony, ntpd); runs do not rely on it, logs do")]
    return [passed("clocks", f"within {max(skew, 0.1):.1f} s")]


def check_shared(go: Mapping[str, Any], seen_after_s: Mapping[str, float | None]) -> list[Finding]:
    """Every node sees a file that rank 0 wrote into the run's folder.

    Args:
        go: where it was written (token), or why it was not (problem).
        seen_after_s: by host, None where it was not seen.
    """
    check = "shared folder"
    if go["problem"]:
        return [error(check, f"rank 0 cannot write: {go['problem']}", "choose another --out")]
    folder = go["token"].rpartition("/")[0]
    blind = [host for host, after in seen_after_s.items() if after is None]
    if blind:
        more = f" and {len(blind) - 4} more" if len(blind) > 4 else ""
        found = f"{', '.join(blind[:4])}{more}: a file that rank 0 wrote to {folder} is not seen"
        return [error(check, found, "choose an --out on a file system that all nodes share")]
    if len(seen_after_s) < 2:
        return []
    slowest = max(seen_after_s, key=lambda host: seen_after_s[host] or 0.0)
    after = seen_after_s[slowest] or 0.0
    shown = f"{folder}: seen by {len(seen_after_s)} nodes, {slowest} last, after {after:.1f} s"
    if after > LATE_S:
        remedy = "mount it with a shorter attribute cache (NFS: actimeo=3)"
        return [warning(check, shown, remedy)]
    return [passed(check, shown)]


def check_backend(backend: str, tried: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[Finding]:
    """What an all-reduce over every rank gave; nothing where no rank tried.

    Args:
        backend: gloo or nccl.
        tried: by rank.
        hosts: by rank.
    """
    gave = {rank: results[backend] for rank, results in tried.items() if backend in results}
    if not gave:
        return []
    failed = [rank for rank, result in gave.items() if "problem" in result]
    if failed:
        remedy = (
            "see each node's host name and links; NCCL_DEBUG=INFO says more"
            if backend == "nccl"
            else ("see each node's host name; set GLOO_SOCKET_IFNAME to the interface that the nodes share")
        )
        found = f"{backend} over all nodes: {_where(failed, hosts)}: {gave[failed[0]]['problem']}"
        return [error("all-reduce", found, remedy)]
    slowest = max(result["seconds"] for result in gave.values())
    return check_reduction(slowest, all(result["right"] for result in gave.values()), len(hosts), backend)
