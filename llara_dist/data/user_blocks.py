"""Events by ranges of users: what concerns one user at a time needs no sort of the whole log."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_EVENTS_PER_BLOCK = 1 << 23


def user_blocks(users: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Cut a log into ranges of users with about 8 million events each; a user is never cut.

    Every block costs one comparison with all events, which is little beside the sort of the block.

    Args:
        users: int32 [n], from 0; negative ones are in no block.

    Yields:
        First user, one past the last, and the places of their events in file order, int64.
    """
    ends = count_ids(users).cumsum()
    first = 0
    while first < len(ends):
        done = int(ends[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(ends, done + _EVENTS_PER_BLOCK, side="right")))
        yield first, stop, np.flatnonzero((users >= first) & (users < stop))
        first = stop


def count_ids(ids: np.ndarray, size: int = 0) -> np.ndarray:
    """How often each id from 0 occurs, int64 [max(largest id + 1, size)]; negative ones are not counted.

    `np.bincount` of a whole column would first make an int64 copy of it.
    """
    counts = np.zeros(max(int(ids.max(initial=-1)) + 1, size), dtype=np.int64)
    for start in range(0, len(ids), _EVENTS_PER_BLOCK):
        part = ids[start : start + _EVENTS_PER_BLOCK]
        counts += np.bincount(part[part >= 0], minlength=len(counts))
    return counts
