"""Events → windows and splits, in pure numpy: which history is asked to predict which target, and in which split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from llara_dist.data.dataset import SPLITS
from llara_dist.data.log import Log
from llara_dist.data.rows import Rows, ranges
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


def make_sequences(log: Log, rules: SequenceRules) -> tuple[dict[str, Rows], dict[str, int]]:
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
    users, items, times = ordered_events(log)
    n = len(users)
    if n == 0:
        raise InputError("no event is left to make sequences of; check min_rating and the filters of the recipe")
    new_user = np.concatenate([[True], users[1:] != users[:-1]])
    user_rank = new_user.cumsum() - 1
    begins = np.flatnonzero(new_user)
    ends = np.concatenate([begins[1:], [n]])
    position = np.arange(n) - begins[user_rank]
    split = _assign(rules, user_rank, position, ends - begins, times)
    long_enough = position >= rules.min_history
    tied = ~new_user & (times == np.concatenate([times[:1], times[:-1]]))
    counts = {
        "users": len(begins),
        "used_events": n,
        "train_windows": int((split == 0).sum()),
    }
    rows: dict[str, Rows] = {}
    first_key = 0
    for place, name in enumerate(SPLITS):
        chosen = np.flatnonzero((split == place) & long_enough)
        counts[f"{name}_dropped_short"] = int(((split == place) & ~long_enough).sum())
        counts[f"{name}_target_time_tied"] = int(tied[chosen].sum())
        if not len(chosen):
            raise InputError(
                f"no {name} row is left: {len(begins)} users, {n} events, split {rules.split}, min_history "
                f"{rules.min_history}; use more data, other ratios or a smaller min_history"
            )
        lengths = np.minimum(position[chosen], rules.max_history)
        rows[name] = Rows(
            keys=np.arange(first_key, first_key + len(chosen), dtype=np.uint64),
            users=users[chosen],
            offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
            items=items[ranges(chosen - lengths, lengths)],
            targets=items[chosen],
        )
        counts[f"{name}_users"] = len(np.unique(user_rank[chosen]))
        first_key += len(chosen)
    with_rows = np.zeros(int(users.max()) + 1, dtype=bool)
    for name in SPLITS:
        with_rows[rows[name].users] = True
    counts["users_without_rows"] = len(begins) - int(with_rows.sum())
    return rows, counts


def ordered_events(log: Log) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Used events, users in the order of their first event, each user's events in time, ties in file order."""
    used = slice(None) if log.used is None else log.used
    users, items, times = log.users[used], log.items[used], log.timestamps[used]
    num_users = int(users.max()) + 1 if len(users) else 0
    first = np.full(num_users, np.iinfo(np.int64).max)
    np.minimum.at(first, users, times)
    order = np.lexsort((times, users, first[users]))  # the last key sorts first; lexsort is stable
    return users[order], items[order], times[order]


def _assign(
    rules: SequenceRules, user_rank: np.ndarray, position: np.ndarray, lengths: np.ndarray, times: np.ndarray
) -> np.ndarray:
    """0 train, 1 val, 2 test, -1 not a target, int8 per event."""
    n, num_users = len(user_rank), len(lengths)
    from_end = lengths[user_rank] - 1 - position
    split = np.full(n, -1, dtype=np.int8)
    if rules.split == "user":
        num_train, num_val = int(rules.ratios[0] * num_users), int(rules.ratios[1] * num_users)
        part = np.where(user_rank < num_train, 0, np.where(user_rank < num_train + num_val, 1, 2))
        split[part == 0] = 0
        last = (part > 0) & (from_end == 0)
        split[last] = part[last]
    elif rules.split == "leave_last_out":
        split[:] = np.where(from_end == 0, 2, np.where(from_end == 1, 1, 0))
    else:
        in_time = np.sort(times)
        cuts = [in_time[min(int(share * n), n - 1)] for share in (rules.ratios[0], sum(rules.ratios[:2]))]
        part = (times >= cuts[0]).astype(np.int8) + (times >= cuts[1])
        split[part == 0] = 0
        next_part = np.concatenate([part[1:], [-1]])
        last = (part > 0) & ((from_end == 0) | (next_part != part))
        split[last] = part[last]
    return split
