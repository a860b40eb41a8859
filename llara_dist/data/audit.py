"""What is odd about a data set: repeats, ties in time, titles that collide, leakage between the splits."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from llara_dist.data.dataset import SPLITS
from llara_dist.data.log import Log
from llara_dist.data.rows import Rows
from llara_dist.data.titles import TitleReport
from llara_dist.hashing import hash64

_UNITS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def audit(log: Log, splits: Mapping[str, Rows], titles: TitleReport, max_history: int) -> dict[str, Any]:
    """Examine a data set before it is written.

    Args:
        log: all events known (none for a source without users) and the catalogue.
        splits: "train", "val", "test" → rows.
        titles: what cleaning the titles found.
        max_history: the longest history.

    Returns:
        A JSON object: `events` (repeats, ties, dates), `catalogue`, `titles`, `rows` per split, `leakage` between
        each two splits: users in both, rows of the second whose (history, target) is also in the first.
    """
    fingerprints = {name: np.sort(_fingerprints(rows, max_history)) for name, rows in splits.items()}
    pairs = [("train", "val"), ("train", "test"), ("val", "test")]
    seen = np.zeros(log.num_items, dtype=bool)
    for rows in splits.values():
        seen[rows.items] = True
        seen[rows.targets] = True
    return {
        "events": _events(log),
        "catalogue": {"items": log.num_items, "items_in_no_row": int((~seen).sum())},
        "titles": titles.as_json(),
        "rows": {
            name: {
                "rows": len(splits[name]),
                "equal_rows": int((np.diff(fingerprints[name]) == 0).sum()),
                "target_in_history": _target_in_history(splits[name]),
                "shortest_history": int(splits[name].lengths.min()),
                "mean_history": round(float(splits[name].lengths.mean()), 3),
            }
            for name in SPLITS
        },
        "leakage": {
            f"{one}/{other}": {
                "users_in_both": _common_users(splits[one], splits[other]),
                "equal_rows_in_both": _rows_in(fingerprints[one], fingerprints[other]),
            }
            for one, other in pairs
        },
    }


def _events(log: Log) -> dict[str, Any]:
    if not len(log):
        return {"events": 0}
    order = np.lexsort((log.timestamps, log.items, log.users))
    same_pair = (np.diff(log.users[order]) == 0) & (np.diff(log.items[order]) == 0)
    same_time = np.diff(log.timestamps[order]) == 0
    used = slice(None) if log.used is None else log.used
    users, times = log.users[used], log.timestamps[used]
    order = np.lexsort((times, users))
    tied = (np.diff(users[order]) == 0) & (np.diff(times[order]) == 0)
    return {
        "events": len(log),
        "users": int(np.bincount(log.users).astype(bool).sum()),
        "duplicate_user_item_time": int((same_pair & same_time).sum()),
        "repeated_user_item": int((same_pair & ~same_time).sum()),
        "used_events": len(users),
        "used_events_tied_in_time": int((np.append(tied, False) | np.insert(tied, 0, False)).sum()),
        "first_event": _date(int(log.timestamps.min()), log.timestamp_unit),
        "last_event": _date(int(log.timestamps.max()), log.timestamp_unit),
    }


def _date(timestamp: int, unit: str) -> str:
    """An ISO date; a wrong unit shows here as a date in 1970 or far in the future."""
    try:
        return datetime.fromtimestamp(timestamp / _UNITS_PER_SECOND[unit], UTC).date().isoformat()
    except (OverflowError, ValueError, OSError):
        return f"{timestamp} {unit} is no date"


def _fingerprints(rows: Rows, max_history: int) -> np.ndarray:
    """One 64-bit hash of (history, target) per row, uint64 [n]."""
    state = hash64(rows.targets, rows.lengths)
    for place in range(max_history):
        inside = place < rows.lengths
        items = np.where(inside, rows.items[np.minimum(rows.offsets[:-1] + place, len(rows.items) - 1)], -1)
        state = hash64(state, items)
    return state


def _target_in_history(rows: Rows) -> int:
    row = np.repeat(np.arange(len(rows)), rows.lengths)
    return int(np.bincount(row[rows.items == rows.targets[row]], minlength=len(rows)).astype(bool).sum())


def _common_users(one: Rows, other: Rows) -> int | None:
    """Users with rows in both, None where users are not known."""
    if (one.users < 0).any() or (other.users < 0).any():
        return None
    seen = np.zeros((2, max(int(one.users.max()), int(other.users.max())) + 1), dtype=bool)
    seen[0, one.users] = True
    seen[1, other.users] = True
    return int(seen.all(axis=0).sum())


def _rows_in(one: np.ndarray, other: np.ndarray) -> int:
    """How many of the sorted values `other` are among the sorted values `one`."""
    places = np.minimum(np.searchsorted(one, other), len(one) - 1)
    return int((one[places] == other).sum())
