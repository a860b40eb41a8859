"""Shard sets as a plan sees them, without any shards."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from llara_dist.stream.order import Source


def source(
    samples: Sequence[int] | int,
    passes: int = 1,
    bytes_per_sample: int = 2600,
    first_id: int = 0,
    weight: Fraction | float | str = 1,
    name: str = "h",
) -> Source:
    """Shards of so many samples each, the same in every pass."""
    sizes = np.atleast_1d(np.asarray(samples, dtype=np.int64))
    counts = np.tile(sizes, passes)
    return Source(
        hash=name,
        first_ids=first_id + np.cumsum(counts) - counts,
        samples=counts,
        bytes=counts * bytes_per_sample,
        passes=np.repeat(np.arange(passes), len(sizes)),
        weight=Fraction(weight),
    )


def ids_of_pass(of: Source, number: int) -> list[int]:
    """All sample ids of a pass, increasing."""
    chosen = np.flatnonzero(of.passes == number)
    return [int(of.first_ids[shard]) + row for shard in chosen for row in range(int(of.samples[shard]))]
