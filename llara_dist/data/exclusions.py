"""What a row may not show as a negative: everything its user ever touched, its window and its target."""

from __future__ import annotations

import numpy as np

from llara_dist.data.rows import Rows, ranges
from llara_dist.data.user_blocks import user_blocks


def touched_items(users: np.ndarray, items: np.ndarray, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """What each user ever touched: CSR by user (offsets int64 [users + 1], items int32, sorted, no repeats)."""
    counts, touched = [np.zeros(1, np.int64)], [np.zeros(0, np.int32)]
    for first, stop, events in user_blocks(users):
        pairs = (users[events] - np.int64(first)) * num_items + items[events]
        pairs.sort()  # np.unique hashes, five times slower here
        pairs = pairs[np.diff(pairs, prepend=-1) != 0]
        counts.append(np.bincount(pairs // num_items, minlength=stop - first))
        touched.append((pairs % num_items).astype(np.int32))
    return np.concatenate(counts).cumsum(), np.concatenate(touched)


def row_exclusions(
    rows: Rows, touched_offsets: np.ndarray, touched_items: np.ndarray, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """The CSR of `Dataset.exclusions` from a CSR by user (offsets int64 [users + 1], items int32)."""
    users = rows.users[start:stop].astype(np.int64)
    begins = touched = np.zeros(len(users), dtype=np.int64)
    if len(touched_offsets) > 1:
        known = users >= 0
        safe = np.where(known, users, 0)
        begins = touched_offsets[safe]
        touched = np.where(known, touched_offsets[safe + 1] - begins, 0)
    windows = rows.lengths[start:stop]
    lengths = touched + windows + 1
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    items = np.empty(int(offsets[-1]), dtype=np.int32)
    items[ranges(offsets[:-1], touched)] = touched_items[ranges(begins, touched)]
    items[ranges(offsets[:-1] + touched, windows)] = rows.items[rows.offsets[start] : rows.offsets[stop]]
    items[offsets[1:] - 1] = rows.targets[start:stop]
    return offsets, items
