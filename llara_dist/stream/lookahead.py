"""What a node's cache has to hold and when, from the plan; the look-ahead of a run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llara_dist.config import DataConfig
from llara_dist.console import GIB
from llara_dist.errors import InputError
from llara_dist.stream.locations import CachedFolder, node_cache, parts_of
from llara_dist.stream.plan import Plan
from llara_dist.stream.prefetch import Need, Prefetcher
from llara_dist.stream.reader import Samples


def node_needs(samples: Samples, plan: Plan, steps: range, ranks: range, world_size: int) -> Iterator[Need]:
    """The remote shards that the node with these ranks reads in these steps, in the order of first need."""
    parts = parts_of(samples)
    for begin, end, number, shard in plan.needs(steps.start, ranks, world_size):
        if begin >= steps.stop:
            return
        part = parts[number]
        if isinstance(part.folder, CachedFolder):
            inside = part.folder.folder(part.manifest["split"])
            yield Need(begin, end, inside.cached(part.file(shard)))


def held_at_once(plan: Plan, steps: range, ranks: range, world_size: int) -> int:
    """The most bytes of shards that the node needs at once in these steps (of their first epoch: all are alike)."""
    until = min(steps.stop, plan.first_step_after_epoch(plan.epoch(steps.start)))
    edges: list[tuple[int, int]] = []
    for begin, end, number, shard in plan.needs(steps.start, ranks, world_size):
        if begin >= until:
            break
        size = int(plan.sources[number].bytes[shard])
        edges += [(begin, size), (end + 1, -size)]
    if not edges:
        return 0
    steps, sizes = np.array(edges, dtype=np.int64).T
    order = np.lexsort((sizes, steps))  # what ends makes room first
    return int(np.cumsum(sizes[order]).max())


def start_lookahead(
    samples: Samples, plan: Plan, settings: DataConfig, steps: range, ranks: range, world_size: int
) -> Prefetcher:
    """Begin to fetch in plan order; to be called by one process of the node.

    Args:
        samples: at least one part is at a URL.
        plan: made from them.
        settings: limit and reach.
        steps: at least one, those that the run will make.
        ranks: the node's.
        world_size: all ranks.

    Raises:
        InputError: the cache's limit is below what single steps need (names both).
    """
    parts = [part for part in parts_of(samples) if isinstance(part.folder, CachedFolder)]
    needed = held_at_once(plan, steps, ranks, world_size)
    indexes = sum(part.manifest["index"]["bytes"] for part in parts)
    if settings.cache_limit_gib and needed + indexes > settings.cache_limit_gib * GIB:
        raise InputError(
            f"data.cache_limit_gib={settings.cache_limit_gib:g}: a step of this node draws from shards of "
            f"{needed / GIB:.3g} GiB beside {indexes / GIB:.3g} GiB of index; raise it, use more nodes, or build "
            "smaller shards"
        )
    reach = needed + int(settings.lookahead_gib * GIB)
    if settings.cache_limit_gib:
        # Readers keep a shard for a little while after its last step: leave room for that.
        spare = int(settings.cache_limit_gib * GIB) - indexes - max(int(part.sources[0].bytes.max()) for part in parts)
        reach = max(needed, min(reach, spare))
    prefetcher = Prefetcher(
        node_cache(settings),
        node_needs(samples, plan, steps, ranks, world_size),
        ahead_bytes=reach,
    )
    prefetcher.at_step(steps.start)
    prefetcher.start()
    return prefetcher
