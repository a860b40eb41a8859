"""What a row may not show as a negative: everything its user ever touched, its window and its target."""

from __future__ import annotations

import numpy as np

from llara_dist.data.rows import Rows, ranges


def touched_items(users: np.ndarray, items: np.ndarray, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """What each user ever touched: CSR by user (offsets int64 [users + 1], items int32, sorted, no repeats)."""
    pairs = np.sort(users.astype(np.int64) * num_items + items)  # np.unique hashes, five times slower here
    pairs = pairs[np.diff(pairs, prepend=-1) != 0]
    num_users = int(users.max()) + 1 if len(users) else 0
    counts = np.bincount(pairs // num_items, minlength=num_users)
    return np.concatenate([[0], counts.cumsum()]).astype(np.int64), (pairs % num_items).astype(np.int32)


def row_exclusions(
    rows: Rows, touched_offsets: np.ndarray, touched_items: np.ndarray, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """The CSR of `Dataset.exclusions` from a CSR by user (offsets int64 [users + 1], items int32)."""
    users = rows.users[start:stop].astype(np.int64)
    known = users >= 0
    safe = np.where(known, users, 0)
    begins = np.concatenate([touched_offsets, [0, 0]])[safe]  # padded so that no users at all is no special case
    touched = np.where(known, np.concatenate([touched_offsets, [0, 0]])[safe + 1] - begins, 0)
    windows = rows.lengths[start:stop]
    lengths = touched + windows + 1
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    items = np.empty(int(offsets[-1]), dtype=np.int32)
    items[ranges(offsets[:-1], touched)] = touched_items[ranges(begins, touched)]
    items[ranges(offsets[:-1] + touched, windows)] = rows.items[rows.offsets[start] : rows.offsets[stop]]
    items[offsets[1:] - 1] = rows.targets[start:stop]
    return offsets, items
