"""The audit on logs in which each oddity was planted and counted by hand."""

from __future__ import annotations

import numpy as np

from llara_dist.data.audit import audit
from llara_dist.data.log import Log
from llara_dist.data.rows import Rows
from llara_dist.data.titles import TitleRules, clean_titles


def _rows(users: list[int], histories: list[list[int]], targets: list[int]) -> Rows:
    return Rows(
        keys=np.arange(len(targets), dtype=np.uint64),
        users=np.array(users, np.int32),
        offsets=np.cumsum([0, *map(len, histories)]).astype(np.int64),
        items=np.array([item for history in histories for item in history], np.int32),
        targets=np.array(targets, np.int32),
    )


def test_finds_what_was_planted() -> None:
    events = [(0, 1, 5), (0, 1, 5), (0, 1, 9), (1, 1, 5), (1, 2, 6), (1, 3, 6), (2, 4, 6), (2, 1, 86_400)]
    users, items, times = (np.array(column) for column in zip(*events, strict=True))
    titles, report = clean_titles(["A", "a", "B", "C", "D", "", "E", "F"], TitleRules(), "movie")
    log = Log(users.astype(np.int32), items.astype(np.int32), times, titles, "movie")
    splits = {
        # Two equal rows; a target in its history; [1, 2] → 3 is also a test row, [2, 1] → 3 and [1] → 2 are not.
        "train": _rows([0, 0, 1, 1], [[1, 2], [1, 2], [2, 3], [2, 1]], [3, 3, 3, 3]),
        "val": _rows([2], [[1, 4]], [0]),
        "test": _rows([1, 2, 3], [[1, 2], [1], [1, 2, 3]], [3, 2, 4]),
    }
    found = audit(log, splits, report, max_history=3)
    assert found["events"] == {
        "events": 8,
        "users": 3,
        "duplicate_user_item_time": 1,
        "repeated_user_item": 1,
        "used_events": 8,
        "used_events_tied_in_time": 4,
        "first_event": "1970-01-01",
        "last_event": "1970-01-02",
    }
    assert found["catalogue"] == {"items": 8, "items_in_no_row": 3}
    assert found["titles"]["collisions"] == 2
    assert found["titles"]["empty_or_unknown"] == 1
    assert found["rows"]["train"]["equal_rows"] == 1
    assert found["rows"]["train"]["target_in_history"] == 1
    assert found["rows"]["test"] == {
        "rows": 3,
        "equal_rows": 0,
        "target_in_history": 0,
        "shortest_history": 1,
        "mean_history": 2.0,
    }
    assert found["leakage"] == {
        "train/val": {"users_in_both": 0, "equal_rows_in_both": 0},
        "train/test": {"users_in_both": 1, "equal_rows_in_both": 1},
        "val/test": {"users_in_both": 1, "equal_rows_in_both": 0},
    }


def test_unused_events_and_unknown_users() -> None:
    titles, report = clean_titles(["A", "B", "C"], TitleRules(), "game")
    times = np.array([7, 7, 10**18])
    log = Log(np.zeros(3, np.int32), np.arange(3, dtype=np.int32), times, titles, "game", np.array([True, False, True]))
    splits = {name: _rows([-1], [[0]], [1]) for name in ("train", "val", "test")}
    found = audit(log, splits, report, max_history=1)
    assert found["events"]["used_events_tied_in_time"] == 0
    assert found["events"]["last_event"] == f"{10**18} s is no date"
    assert found["leakage"]["train/test"] == {"users_in_both": None, "equal_rows_in_both": 1}
