"""What is odd about a data set: repeats, ties in time, titles that collide, leakage between the splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from llara_dist.data.dataset import SPLITS
from llara_dist.data.log import Log
from llara_dist.data.rows import Rows, RowSource, chunks
from llara_dist.data.titles import TitleReport
from llara_dist.data.user_blocks import count_ids, user_blocks
from llara_dist.hashing import hash64

_UNITS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def audit(log: Log, splits: Mapping[str, RowSource], titles: TitleReport, max_history: int) -> dict[str, Any]:
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
    seen = np.zeros(log.num_items, dtype=bool)
    found = {name: _examine(splits[name], max_history, seen) for name in SPLITS}
    pairs = [("train", "val"), ("train", "test"), ("val", "test")]
    return {
        "events": _events(log),
        "catalogue": {"items": log.num_items, "items_in_no_row": int((~seen).sum())},
        "titles": titles.as_json(),
        "rows": {
            name: {
                "rows": len(splits[name]),
                "equal_rows": int(np.count_nonzero(rows.fingerprints[1:] == rows.fingerprints[:-1])),
                "target_in_history": rows.target_in_history,
                "shortest_history": rows.shortest_history,
                "mean_history": round(rows.history_items / len(splits[name]), 3),
            }
            for name, rows in found.items()
        },
        "leakage": {
            f"{one}/{other}": {
                "users_in_both": _common_users(found[one].users, found[other].users),
                "equal_rows_in_both": _rows_in(found[one].fingerprints, found[other].fingerprints),
            }
            for one, other in pairs
        },
    }


@dataclass(frozen=True)
class _Split:
    """What is known of a split after its rows went by once."""

    fingerprints: np.ndarray
    """uint64 [rows], sorted: hashes of (history, target)"""
    users: np.ndarray
    """int32, sorted, no repeats; -1 first where a user is not known"""
    target_in_history: int
    shortest_history: int
    history_items: int


def _examine(source: RowSource, max_history: int, seen: np.ndarray) -> _Split:
    """Go over a split's rows; items that occur are marked in `seen`, bool [items]."""
    fingerprints = np.empty(len(source), dtype=np.uint64)
    users, shortest, with_target, done, items = [], [], 0, 0, 0
    for rows in chunks(source):
        fingerprints[done : done + len(rows)] = _fingerprints(rows, max_history)
        seen[rows.items] = True
        seen[rows.targets] = True
        users.append(np.unique(rows.users))
        shortest.append(int(rows.lengths.min()))
        with_target += _target_in_history(rows)
        items += len(rows.items)
        done += len(rows)
    fingerprints.sort()
    return _Split(fingerprints, np.unique(np.concatenate(users)), with_target, min(shortest), items)


def _events(log: Log) -> dict[str, Any]:
    if not len(log):
        return {"events": 0}
    same_all = same_pair = tied_in_time = 0
    for _, _, events in user_blocks(log.users):
        users, items, times = log.users[events], log.items[events], log.timestamps[events]
        order = np.lexsort((times, items, users))
        pair = (np.diff(users[order]) == 0) & (np.diff(items[order]) == 0)
        equal = pair & (np.diff(times[order]) == 0)
        same_all += int(equal.sum())
        same_pair += int((pair & ~equal).sum())
        if log.used is not None:
            users, times = users[log.used[events]], times[log.used[events]]
        order = np.lexsort((times, users))
        tied = (np.diff(users[order]) == 0) & (np.diff(times[order]) == 0)
        tied_in_time += int((np.append(tied, False) | np.insert(tied, 0, False)).sum())
    return {
        "events": len(log),
        "users": int(np.count_nonzero(count_ids(log.users))),
        "duplicate_user_item_time": same_all,
        "repeated_user_item": same_pair,
        "used_events": len(log) if log.used is None else int(log.used.sum()),
        "used_events_tied_in_time": tied_in_time,
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


def _common_users(one: np.ndarray, other: np.ndarray) -> int | None:
    """Users with rows in both, None where users are not known."""
    if one[0] < 0 or other[0] < 0:
        return None
    return len(np.intersect1d(one, other, assume_unique=True))


def _rows_in(one: np.ndarray, other: np.ndarray) -> int:
    """How many of the sorted values `other` are among the sorted values `one`."""
    places = np.minimum(np.searchsorted(one, other), len(one) - 1)
    return int((one[places] == other).sum())
