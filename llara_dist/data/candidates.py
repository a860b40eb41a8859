"""Candidates: the target and the negatives shown beside it, a pure function of (seed, draw, key, exclusions).

The negatives of a row do not depend on the other rows, on their order or on the process that draws them: each is
hashed from the row's key (`llara_dist.hashing`). Everything the user ever touched is excluded, as LLaRA's task
states it (arXiv 2312.02445, section 4.1: "items never interacted with"); the published code excludes only the
last ten items.
"""

from __future__ import annotations

import numpy as np

from llara_dist.errors import InputError
from llara_dist.hashing import hash64, text_seed

_NEGATIVE = text_seed("llara_dist/candidates/negative")
_SHOWN = text_seed("llara_dist/candidates/shown")
_ROWS_PER_CHUNK = 4096


def draw_candidates(
    keys: np.ndarray,
    targets: np.ndarray,
    exclude_offsets: np.ndarray,
    exclude_items: np.ndarray,
    num_items: int,
    num_candidates: int,
    seed: int,
    draw: int,
) -> np.ndarray:
    """Draw each row's candidates: the target and `num_candidates` - 1 distinct negatives, in shown order.

    Args:
        keys: uint64 [n], unique per row.
        targets: int32 [n], in [0, num_items).
        exclude_offsets: int64 [n + 1] into `exclude_items`: row r may not show `exclude_items[o[r]:o[r + 1]]`.
        exclude_items: int32 [total], in any order, repeats allowed; the target need not be among them.
        num_items: size of the catalogue.
        num_candidates: how many are shown, target included.
        seed: the data set's or the build's seed.
        draw: which draw (a pass of the shards; 0 for the frozen candidates of validation and test).

    Returns:
        int32 [n, num_candidates], no repeats within a row, the target at a uniformly drawn place.

    Raises:
        InputError: a row has fewer than `num_candidates` - 1 items left to show. Fewer are never shown silently.
    """
    n = len(keys)
    if num_candidates < 2 or num_candidates > num_items:
        raise InputError(
            f"num_candidates {num_candidates}: must be at least 2 and at most the catalogue's {num_items} items"
        )
    out = np.empty((n, num_candidates), dtype=np.int32)
    for start in range(0, n, _ROWS_PER_CHUNK):
        stop = min(start + _ROWS_PER_CHUNK, n)
        first, last = int(exclude_offsets[start]), int(exclude_offsets[stop])
        out[start:stop] = _draw_chunk(
            keys[start:stop].astype(np.uint64),
            targets[start:stop].astype(np.int64),
            np.diff(exclude_offsets[start : stop + 1]),
            exclude_items[first:last].astype(np.int64),
            num_items,
            num_candidates,
            seed,
            draw,
        )
    return out


def _draw_chunk(
    keys: np.ndarray,
    targets: np.ndarray,
    exclude_lengths: np.ndarray,
    exclude_items: np.ndarray,
    num_items: int,
    num_candidates: int,
    seed: int,
    draw: int,
) -> np.ndarray:
    n, wanted = len(keys), num_candidates - 1
    rows = np.arange(n, dtype=np.int64)
    # (row, item) pairs as one sorted integer each: membership for any catalogue size by binary search.
    excluded = np.concatenate(
        [np.repeat(rows, exclude_lengths) * num_items + exclude_items, rows * num_items + targets]
    )
    excluded.sort()
    excluded = excluded[np.concatenate([[True], excluded[1:] != excluded[:-1]])]
    num_allowed = num_items - np.bincount(excluded // num_items, minlength=n)
    if num_allowed.min() < wanted:
        row = int(num_allowed.argmin())
        raise InputError(
            f"row {int(keys[row])}: only {int(num_allowed[row])} of {num_items} items are left as negatives, "
            f"{wanted} are needed; lower num_candidates"
        )
    shown = np.empty((n, num_candidates), dtype=np.int64)
    shown[:, 0] = targets
    # Rejection is quick only while most of the catalogue is allowed; the rest is ranked whole.
    dense = num_allowed < max(num_items // 4, 4 * wanted)
    for row in np.flatnonzero(dense):
        low, high = np.searchsorted(excluded, [row * num_items, (row + 1) * num_items])
        allowed = np.setdiff1d(np.arange(num_items), excluded[low:high] - row * num_items, assume_unique=True)
        ranks = hash64(_NEGATIVE, seed, draw, keys[row], allowed)
        shown[row, 1:] = allowed[np.argsort(ranks, kind="stable")[:wanted]]
    pending, tries = np.flatnonzero(~dense), 2 * wanted
    while len(pending):
        # More tries extend a row's own sequence, so what is drawn does not depend on the other rows.
        drawn = _hashed_items(keys[pending], np.arange(tries), num_items, seed, draw)
        fresh = ~_contains(excluded, pending[:, None] * num_items + drawn) & ~_repeats(drawn)
        order = fresh.cumsum(axis=1)
        done = order[:, -1] >= wanted
        take = fresh[done] & (order[done] <= wanted)
        shown[pending[done], 1:] = drawn[done][take].reshape(-1, wanted)
        pending, tries = pending[~done], 2 * tries
    places = hash64(_SHOWN, seed, draw, keys[:, None], np.arange(num_candidates))
    return np.take_along_axis(shown, np.argsort(places, axis=1, kind="stable"), axis=1).astype(np.int32)


def _hashed_items(keys: np.ndarray, tries: np.ndarray, num_items: int, seed: int, draw: int) -> np.ndarray:
    """Items int64 [len(keys), len(tries)], each uniform over the catalogue by the hash's upper 32 bits."""
    high = hash64(_NEGATIVE, seed, draw, keys[:, None], tries) >> np.uint64(32)
    return ((high * np.uint64(num_items)) >> np.uint64(32)).astype(np.int64)


def _contains(sorted_values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Whether each query is among the sorted values, bool of the queries' shape."""
    places = np.minimum(np.searchsorted(sorted_values, queries), len(sorted_values) - 1)
    return sorted_values[places] == queries


def _repeats(drawn: np.ndarray) -> np.ndarray:
    """Whether each entry of a row equals an earlier entry of that row, bool [n, m]."""
    order = np.argsort(drawn, axis=1, kind="stable")
    ranked = np.take_along_axis(drawn, order, axis=1)
    repeated = np.zeros(drawn.shape, dtype=bool)
    repeated[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    out = np.empty_like(repeated)
    np.put_along_axis(out, order, repeated, axis=1)
    return out
