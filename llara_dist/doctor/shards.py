"""The training samples: are they there, and do they come fast enough?"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from llara_dist.doctor.bounded import ProbeError, call
from llara_dist.doctor.verdicts import passed, skipped, warning
from llara_dist.errors import Finding, findings_of

OPENING_S = 60.0
MEASURING_S = 60.0
MEASURED_S = 1.0
"""each of the two ways to read, at most"""
BATCH = 64
TOKENS_PER_SECOND = 10_000.0
"""that a fast GPU tunes of a 7B model: what a reader must keep up with. Published figures for one A100 are 2,400 to
3,700 tokens a second."""
SPARE = 3.0
"""times that rate, so that reading never holds a step up"""


def open_shards(location: str) -> dict[str, Any]:
    """What shards.json and the manifest say; called in a process of its own."""
    from llara_dist.stream.cache import NodeCache
    from llara_dist.stream.locations import is_remote, open_samples

    with tempfile.TemporaryDirectory(prefix="llara_dist-doctor-") as folder:
        samples = open_samples(location, "train", NodeCache(Path(folder), attempts=2))
        return {
            "samples": len(samples),
            "bytes": sum(int(source.bytes.sum()) for source in samples.sources),
            "shards": sum(len(source.bytes) for source in samples.sources),
            "remote": is_remote(samples),
            "tokenizer": samples.info["tokenizer_hash"],
        }


def measure_reading(location: str) -> dict[str, Any]:
    """Samples a second, one after the other and at random, of one reader; called in a process of its own.

    Of shards at a URL one shard is fetched into a temporary folder, and the transfer is measured as well.
    """
    import numpy as np

    from llara_dist.stream.cache import NodeCache
    from llara_dist.stream.locations import is_remote, open_samples, parts_of

    with tempfile.TemporaryDirectory(prefix="llara_dist-doctor-") as folder:
        samples = open_samples(location, "train", NodeCache(Path(folder), attempts=2))
        part = parts_of(samples)[0]
        fetched = None
        if is_remote(samples):
            smallest = min(range(len(part.manifest["shards"])), key=lambda n: part.manifest["shards"][n]["bytes"])
            file = part.file(smallest)
            start = time.perf_counter()
            part.split_folder.local(file)
            fetched = file.bytes / (time.perf_counter() - start)
            shards = [smallest]
        else:
            shards = list(range(min(8, len(part.manifest["shards"]))))
            for shard in shards:
                _forget(part.split_folder.local(part.file(shard)))
        ids = np.concatenate([np.arange(part.first_ids[shard], part.first_ids[shard + 1]) for shard in shards])
        info = part.lookup(ids[:4096])
        random = np.random.default_rng(0).permutation(ids)
        rates = {"random": _rate(part, random), "sequential": _rate(part, ids)}
        part.close()
        return {**rates, "tokens": float(info.tokens.mean()), "fetched": fetched}


def _rate(part: Any, ids: Any) -> float:
    start, done = time.perf_counter(), 0
    for first in range(0, len(ids), BATCH):
        done += len(part.read(ids[first : first + BATCH]))
        if time.perf_counter() - start > MEASURED_S:
            break
    return done / (time.perf_counter() - start)


def _forget(path: Path) -> None:
    """Have Linux drop its copy of a file, so that the disk or its server is measured and not this node's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def check_reading(sequential: float, random: float, tokens: float) -> list[Finding]:
    """Whether one reader keeps up with a GPU.

    Args:
        sequential: samples a second, one after the other.
        random: samples a second, in random order.
        tokens: mean length of a sample.
    """
    taken = TOKENS_PER_SECOND / tokens
    shown = f"{random:,.0f} samples/s at random, {sequential:,.0f} in order; a GPU tuning 7B takes about {taken:.0f}"
    if random >= SPARE * taken:
        return [passed("reading", shown)]
    return [warning("reading", shown, "copy the shards to a faster or nearer disk, or raise data.workers")]


def check_fetching(fetched: float, tokens: float, sample_bytes: float, ranks: int) -> list[Finding]:
    """Whether a node fetches as fast as its GPUs take; each shard is fetched once a node.

    Args:
        fetched: bytes a second, one transfer.
        tokens: mean length of a sample.
        sample_bytes: mean size of a sample in its shard.
        ranks: of this node.
    """
    need = ranks * TOKENS_PER_SECOND / tokens * sample_bytes
    shown = f"{fetched / 1e6:.1f} MB/s, one transfer; this node's ranks take about {need / 1e6:.2g} MB/s"
    if fetched >= need:
        return [passed("fetching", shown)]
    remedy = "use a bucket in the nodes' own region, or copy the shards to a disk"
    return [warning("fetching", shown, remedy)]


def examine(location: str, ranks: int, quick: bool) -> tuple[list[Finding], str | None]:
    """The topic's findings, and the hash of the tokenizer that the shards were built with, where it is known.

    Args:
        location: path or URL of a shards folder or mixture, "" = none was given.
        ranks: of this node.
        quick: leave out reading.
    """
    if not location:
        return [skipped("shards", "not looked at: give --shards")], None
    try:
        opened = call(open_shards, OPENING_S, location=location)
    except ProbeError as problem:
        return [*findings_of("shards", problem)], None
    size = opened["bytes"] / 1e6
    shown = f"{opened['samples']:,} samples in {opened['shards']} shard{'s' * (opened['shards'] > 1)}, {size:,.1f} MB"
    findings = [passed("shards", shown)]
    if quick:
        return [*findings, skipped("reading", "not tried: --quick")], opened["tokenizer"]
    try:
        measured = call(measure_reading, MEASURING_S, location=location)
    except ProbeError as problem:
        return [*findings, *findings_of("reading", problem)], opened["tokenizer"]
    tokens, fetched = measured["tokens"], measured["fetched"]
    findings += check_reading(measured["sequential"], measured["random"], tokens)
    if fetched is not None:
        findings += check_fetching(fetched, tokens, opened["bytes"] / opened["samples"], ranks)
    return findings, opened["tokenizer"]
