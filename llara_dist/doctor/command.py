"""`llara-dist doctor`: this node examined topic by topic; under a launcher every node, told by rank 0."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llara_dist import distributed
from llara_dist.console import say
from llara_dist.doctor import (
    base_model,
    gpu_facts,
    gpus,
    libraries,
    links,
    network,
    nodes,
    processor,
    scheduler,
    storage,
)
from llara_dist.doctor import (
    shards as shards_topic,
)
from llara_dist.doctor.report import ALL, Entry, merged, show, summary
from llara_dist.errors import Finding, InputError

ALL_NODES = "all nodes together"


def doctor(shards: str = "", out: Path = Path("runs"), model: str = "", quick: bool = False) -> dict[str, Any]:
    """Say whether a run will work on this machine or, started by srun, torchrun or deepspeed, on every node.

    Nothing stays behind: 64 MiB are written to the run's folder, or the nearest that is there, and removed.

    Args:
        shards: path or URL of the shards to read, if any.
        out: folder that runs will be written to; it need not be there.
        model: folder of the base model, if any; no weight is read.
        quick: leave out what takes more than two seconds: trying libraries, collectives, disk and shards.

    Returns:
        Every finding with its topic and host.

    Raises:
        InputError: one or more findings are errors.
    """
    world = distributed.read_world()
    alone, host = world.size == 1, socket.gethostname()
    entries: list[Entry] = []
    if world.local_rank == 0:
        local_ranks = None if alone else distributed.local_size(world)
        for topic, findings in examine_node(shards, out, model, quick, local_ranks):
            entries += [Entry(topic, host, finding) for finding in findings]
            if alone:
                show(topic, findings)
    errors = sum(entry.finding.severity == "error" for entry in entries)
    if not alone:
        met, found = nodes.examine(world, out, [entry.to_json() for entry in entries])
        if met is None:
            errors += 1
        else:
            errors = met["errors"]
        if world.is_main and met is not None:
            entries = [Entry.from_json(entry) for place in met["ranks"] for entry in place["report"]]
        entries += [Entry(ALL_NODES, host if met is None else ALL, finding) for finding in found]
        if world.is_main or (met is None and world.local_rank == 0):
            _show_nodes(entries)
            say(summary(entries))
    else:
        say(summary(entries))
    result = {"findings": [entry.to_json() for entry in entries]}
    if errors:
        raise InputError(f"doctor: {errors} thing{'s' * (errors != 1)} would stop a run; see the table", result=result)
    return result


def examine_node(
    shards: str, out: Path, model: str, quick: bool, local_ranks: int | None
) -> Iterator[tuple[str, list[Finding]]]:
    """Topics with what was found, one after the other.

    Args:
        shards: path or URL, "" = none.
        out: the run's folder.
        model: folder or hub id, "" = none.
        quick: leave out what takes long.
        local_ranks: that were started on this node; None = as many as it has GPUs.
    """
    seen = gpu_facts.probe()
    count = len(seen.torch.devices)
    ranks = local_ranks or max(1, count)
    yield "processor and memory", processor.examine(processor.probe(), ranks, count)
    yield "GPUs", gpus.examine(seen)
    yield "libraries", libraries.examine(seen, quick)
    yield "links and limits", links.examine(links.probe(count), seen)
    yield "network", network.examine(count, quick)
    yield "folders", storage.examine(out, quick)
    findings, tokenizer = shards_topic.examine(shards, ranks, quick)
    yield "shards", findings
    yield "model", base_model.examine(model, tokenizer)
    yield "starting on several nodes", scheduler.examine()


def _show_nodes(entries: list[Entry]) -> None:
    hosts = sorted({entry.host for entry in entries if entry.host != ALL})
    topics = dict.fromkeys(entry.topic for entry in entries)
    for topic in topics:
        show(topic, [entry.finding for entry in merged([e for e in entries if e.topic == topic], hosts)])
