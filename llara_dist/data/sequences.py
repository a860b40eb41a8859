"""Events → windows and splits, in pure numpy: which history is asked to predict which target, and in which split.

A window is a slice of its user's ordered events, and in each split a user's targets are neighbours; so a split is a few
numbers a user beside one column of items, and rows are laid out only where they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from llara_dist.data.dataset import SPLITS
from llara_dist.data.log import Log
from llara_dist.data.rows import ROWS_PER_CHUNK, Rows, ranges
from llara_dist.data.user_blocks import count_ids, user_blocks
from llara_dist.errors import InputError


@dataclass(frozen=True)
class SequenceRules:
    """How windows are cut and split."""

    split: Literal["user", "leave_last_out", "temporal"] = "user"
    """user: whole users, in the order of their first event, train then val then test; every prefix window of a
    train user, the last window of the others (LLaRA's protocol). leave_last_out: every user's last event is a test
    target, the one before it a validation target, the others train. temporal: the events' times are cut at two
    quantiles; validation and test ask for each user's last event of that period."""
    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, val and test, of the users (user) or of the events (temporal); they sum to 1."""
    min_history: int = 3
    """A window with fewer items before its target is dropped and counted."""
    max_history: int = 10
    """A window keeps the last items before its target, at most this many."""

    def __post_init__(self) -> None:
        if self.split not in ("user", "leave_last_out", "temporal"):
            raise InputError(f"split {self.split!r}: must be user, leave_last_out or temporal")
        if len(self.ratios) != 3 or min(self.ratios) <= 0 or abs(sum(self.ratios) - 1) > 1e-9:
            raise InputError(f"ratios {list(self.ratios)}: must be three positive numbers that sum to 1")
        if not 1 <= self.min_history <= self.max_history:
            raise InputError(
                f"min_history {self.min_history}, max_history {self.max_history}: need 1 ≤ min_history ≤ max_history"
            )


@dataclass(frozen=True)
class Windows:
    """The rows of one split as slices of the ordered events (a `RowSource`); [u] are the users with rows."""

    items: np.ndarray
    """int32 [events]: user after user, each user's in time"""
    users: np.ndarray
    """int32 [u]: user ids"""
    begins: np.ndarray
    """int64 [u]: the user's first event"""
    first_targets: np.ndarray
    """int64 [u]: the event that the user's first row asks for; the next rows ask for the events after it"""
    row_offsets: np.ndarray
    """int64 [u + 1]: the user's rows"""
    first_key: int
    max_history: int

    def __len__(self) -> int:
        return int(self.row_offsets[-1])

    def chunk(self, start: int, stop: int) -> Rows:
        """The rows from `start` up to `stop`."""
        owners, targets = self._targets(start, stop)
        lengths = np.minimum(targets - self.begins[owners], self.max_history)
        return Rows(
            keys=np.arange(self.first_key + start, self.first_key + stop, dtype=np.uint64),
            users=self.users[owners],
            offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
            items=self.items[ranges(targets - lengths, lengths)],
            targets=self.items[targets],
        )

    def count(self, marked: np.ndarray) -> int:
        """How many rows ask for an event that is marked, bool [events]."""
        size = ROWS_PER_CHUNK
        return sum(
            int(marked[self._targets(start, min(start + size, len(self)))[1]].sum())
            for start in range(0, len(self), size)
        )

    def _targets(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Owner (its place in `users`) and target event of each row."""
        rows = np.arange(start, stop)
        owners = np.searchsorted(self.row_offsets, rows, side="right") - 1
        return owners, self.first_targets[owners] + rows - self.row_offsets[owners]


@dataclass(frozen=True)
class OrderedEvents:
    """Used events, users in the order of their first event, each user's events in time, ties in file order."""

    users: np.ndarray
    """int32 [u]: user ids"""
    offsets: np.ndarray
    """int64 [u + 1]: each user's events"""
    items: np.ndarray
    """int32 [n]"""
    tied: np.ndarray
    """bool [n]: whether the user's event before it has the same time"""
    by_period: np.ndarray | None
    """int64 [u, 3]: events before the first cut in time, up to the second, after it; None without cuts"""


def make_sequences(log: Log, rules: SequenceRules) -> tuple[dict[str, Windows], dict[str, int]]:
    """Cut a log into windows and split them.

    Events of a user are ordered by time, ties in file order (a stable sort); users by the time of their first used
    event, ties by user id. Keys run 0, 1, … over train, val, test in that order.

    Args:
        log: the events; those with `used` false are left out.
        rules: the recipe's rules.

    Returns:
        "train", "val", "test" → rows, and counts: users, used events, prefix windows of the train part with the
        short ones, short windows dropped per split, users without any row, and targets whose place in time is
        undetermined because the event before them carries the same timestamp.

    Raises:
        InputError: a split comes out empty.
    """
    events = order_events(log, rules.ratios if rules.split == "temporal" else None)
    n = len(events.items)
    if n == 0:
        raise InputError("no event is left to make sequences of; check min_rating and the filters of the recipe")
    num_users = len(events.users)
    targets = _target_positions(rules, np.diff(events.offsets), events.by_period)
    first, stop = targets["train"]
    counts = {"users": num_users, "used_events": n, "train_windows": int((stop - first).sum())}
    windows: dict[str, Windows] = {}
    without_rows = np.ones(num_users, dtype=bool)
    first_key = 0
    for name in SPLITS:
        first, stop = targets[name]
        long_enough = np.maximum(first, rules.min_history)
        rows = np.maximum(stop - long_enough, 0)
        chosen = np.flatnonzero(rows)
        counts[f"{name}_dropped_short"] = int((stop - first).sum() - rows.sum())
        if not len(chosen):
            raise InputError(
                f"no {name} row is left: {num_users} users, {n} events, split {rules.split}, min_history "
                f"{rules.min_history}; use more data, other ratios or a smaller min_history"
            )
        begins = events.offsets[:-1][chosen]
        windows[name] = Windows(
            items=events.items,
            users=events.users[chosen],
            begins=begins,
            first_targets=begins + long_enough[chosen],
            row_offsets=np.concatenate([[0], rows[chosen].cumsum()]),
            first_key=first_key,
            max_history=rules.max_history,
        )
        counts[f"{name}_target_time_tied"] = windows[name].count(events.tied)
        counts[f"{name}_users"] = len(chosen)
        without_rows[chosen] = False
        first_key += len(windows[name])
    counts["users_without_rows"] = int(without_rows.sum())
    return windows, counts


def order_events(log: Log, ratios: tuple[float, float, float] | None = None) -> OrderedEvents:
    """Bring the used events into the order of the sequences, a block of users at a time.

    Args:
        log: the events.
        ratios: shares of the events in time at which periods are cut; None for no cuts.
    """
    counts, first_times = _used_events_by_user(log)
    present = np.flatnonzero(counts)
    users = present[np.argsort(first_times[present], kind="stable")].astype(np.int32)
    offsets = np.concatenate([[0], counts[users].cumsum()]).astype(np.int64)
    rank_of_user = np.full(len(counts), -1, dtype=np.int32)
    rank_of_user[users] = np.arange(len(users), dtype=np.int32)
    ranks = rank_of_user[log.users]
    if log.used is not None:
        ranks[~log.used] = -1
    n = int(offsets[-1])
    items, tied = np.empty(n, dtype=np.int32), np.zeros(n, dtype=bool)
    cuts = None if ratios is None or n == 0 else _cuts_in_time(log, ratios)
    by_period = None if cuts is None else np.zeros((len(users), 3), dtype=np.int64)
    for first, stop, events in user_blocks(ranks):
        owners, times = ranks[events], log.timestamps[events]
        order = np.lexsort((times, owners))  # stable: ties stay in file order
        block = slice(offsets[first], offsets[stop])
        items[block] = log.items[events[order]]
        tied[block][1:] = (np.diff(owners[order]) == 0) & (np.diff(times[order]) == 0)
        if cuts is not None and by_period is not None:
            period = (times >= cuts[0]).astype(np.int64) + (times >= cuts[1])
            cells = (owners - first) * np.int64(3) + period
            by_period[first:stop] = np.bincount(cells, minlength=3 * (stop - first)).reshape(-1, 3)
    return OrderedEvents(users, offsets, items, tied, by_period)


def _used_events_by_user(log: Log) -> tuple[np.ndarray, np.ndarray]:
    """Number of used events and time of the first one, int64 [users] each."""
    num_users = int(log.users.max(initial=-1)) + 1
    counts = np.zeros(num_users, dtype=np.int64)
    first = np.full(num_users, np.iinfo(np.int64).max)
    for start in range(0, len(log), ROWS_PER_CHUNK):
        part = slice(start, start + ROWS_PER_CHUNK)
        used = slice(None) if log.used is None else log.used[part]
        users = log.users[part][used]
        counts += count_ids(users, num_users)
        np.minimum.at(first, users, log.timestamps[part][used])
    return counts, first


def _cuts_in_time(log: Log, ratios: tuple[float, float, float]) -> list[int]:
    """The times at which validation and test begin: quantiles of the used events' times."""
    times = log.timestamps.copy() if log.used is None else log.timestamps[log.used]
    places = [min(int(share * len(times)), len(times) - 1) for share in (ratios[0], sum(ratios[:2]))]
    times.partition(places)
    return [int(times[place]) for place in places]


def _target_positions(
    rules: SequenceRules, lengths: np.ndarray, by_period: np.ndarray | None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per split, which of each user's events are targets: from the first up to the second position, int64 [u] each."""
    num_users = len(lengths)
    none = np.zeros(num_users, dtype=np.int64)
    if by_period is not None:
        # A user's times rise, so the periods follow one another; the last event of the later two is asked for.
        before, until = by_period[:, 0], by_period[:, :2].sum(axis=1)
        return {
            "train": (none, before),
            "val": (np.maximum(until - 1, before), until),
            "test": (np.maximum(lengths - 1, until), lengths),
        }
    if rules.split == "leave_last_out":
        train = np.maximum(lengths - 2, 0)
        val = np.maximum(lengths - 1, 0)
        return {"train": (none, train), "val": (train, val), "test": (val, lengths)}
    num_train, num_val = int(rules.ratios[0] * num_users), int(rules.ratios[1] * num_users)
    rank = np.arange(num_users)
    is_val = (rank >= num_train) & (rank < num_train + num_val)
    is_test = rank >= num_train + num_val
    return {
        "train": (none, np.where(rank < num_train, lengths, 0)),
        "val": (np.where(is_val, lengths - 1, 0), np.where(is_val, lengths, 0)),
        "test": (np.where(is_test, lengths - 1, 0), np.where(is_test, lengths, 0)),
    }
