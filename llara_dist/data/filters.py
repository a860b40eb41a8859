"""Which events of a log make sequences: repeats and thin users and items are left out, and counted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llara_dist.data.log import Log
from llara_dist.data.user_blocks import count_ids, user_blocks
from llara_dist.errors import InputError


@dataclass(frozen=True)
class FilterRules:
    """What is left out before windows are cut."""

    duplicates: Literal["drop", "keep"] = "drop"
    """Events equal in user, item and time: keep the first only, or all."""
    repeats: Literal["keep", "first"] = "keep"
    """Events equal in user and item at different times: keep all, or the first only."""
    min_user_events: int = 0
    """Users with fewer used events are left out; applied with `min_item_events` until both hold (a core)."""
    min_item_events: int = 0
    """Items with fewer used events leave the catalogue; 0 keeps it whole, items without events included."""

    def __post_init__(self) -> None:
        if min(self.min_user_events, self.min_item_events) < 0:
            raise InputError("filters: min_user_events and min_item_events must not be negative")


def filter_log(log: Log, rules: FilterRules) -> tuple[Log, dict[str, int]]:
    """Apply the rules; events left out stay in the log as unused, so that they still exclude negatives.

    Args:
        log: the log as read.
        rules: the recipe's rules.

    Returns:
        The log, with item ids renumbered when items leave the catalogue, and counts of what was left out.

    Raises:
        InputError: nothing is left.
    """
    used = np.ones(len(log), dtype=bool) if log.used is None else log.used.copy()
    counts = {"raw_events": len(log), "unused_by_rating": int((~used).sum())}
    if rules.duplicates == "drop":
        repeated = _repeated(log, used, same_time=True)
        counts["duplicate_events_left_out"] = int(repeated.sum())
        used &= ~repeated
    if rules.repeats == "first":
        repeated = _repeated(log, used, same_time=False)
        counts["repeated_events_left_out"] = int(repeated.sum())
        used &= ~repeated
    if rules.min_user_events > 1 or rules.min_item_events > 0:
        before_users, before = _num_users(log, used), int(used.sum())
        used = _core(log, used, rules)
        counts["users_left_out"] = before_users - _num_users(log, used)
        counts["events_left_out_by_core"] = before - int(used.sum())
    log = replace(log, used=used)
    if rules.min_item_events > 0:
        log, counts["items_left_out"] = _shrink_catalogue(log, used)
    if log.used is None or not log.used.any():
        raise InputError("no event is left after the filters; lower min_user_events, min_item_events or min_rating")
    return log, counts


def _repeated(log: Log, used: np.ndarray, same_time: bool) -> np.ndarray:
    """Which used events repeat an earlier used one of the same user and item, bool [n].

    Args:
        log: the events.
        used: which of them count, bool [n].
        same_time: whether only events of the same time are repeats; otherwise the first in time is none.
    """
    repeated = np.zeros(len(log), dtype=bool)
    for _, _, events in user_blocks(log.users):
        events = events[used[events]]
        users, items, times = log.users[events], log.items[events], log.timestamps[events]
        order = np.lexsort((times, items, users))  # stable: equal events stay in file order
        equal = (np.diff(users[order]) == 0) & (np.diff(items[order]) == 0)
        if same_time:
            equal &= np.diff(times[order]) == 0
        repeated[events[order[1:][equal]]] = True
    return repeated


def _num_users(log: Log, used: np.ndarray) -> int:
    return int(np.count_nonzero(count_ids(log.users[used])))


def _core(log: Log, used: np.ndarray, rules: FilterRules) -> np.ndarray:
    num_users = int(log.users.max(initial=0)) + 1
    while True:
        thin_users = count_ids(log.users[used], num_users) < rules.min_user_events
        thin_items = count_ids(log.items[used], log.num_items) < rules.min_item_events
        kept = used & ~thin_users[log.users]
        kept &= ~thin_items[log.items]
        if kept.sum() == used.sum():
            return kept
        used = kept


def _shrink_catalogue(log: Log, used: np.ndarray) -> tuple[Log, int]:
    """Keep the items that have used events, renumbered in their order, and the events of kept items."""
    kept_items = np.zeros(log.num_items, dtype=bool)
    kept_items[log.items[used]] = True
    new_id = (kept_items.cumsum() - 1).astype(np.int32)
    events = kept_items[log.items]
    places = np.flatnonzero(kept_items)
    shrunk = replace(
        log,
        users=log.users[events],
        items=new_id[log.items[events]],
        timestamps=log.timestamps[events],
        used=used[events],
        titles=[log.titles[place] for place in places],
        item_ids=[log.item_ids[place] if log.item_ids else str(place) for place in places],
    )
    return shrunk, log.num_items - len(places)
