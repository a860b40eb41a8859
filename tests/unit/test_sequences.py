"""Windows, splits and filters on logs small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llara_dist.data.filters import FilterRules, filter_log
from llara_dist.data.log import Log
from llara_dist.data.rows import RowSource
from llara_dist.data.sequences import SequenceRules, make_sequences
from llara_dist.errors import InputError


def _log(events: list[tuple[int, int, int]], num_items: int = 50, used: list[bool] | None = None) -> Log:
    users, items, times = (np.array(column) for column in zip(*events, strict=True))
    return Log(
        users=users.astype(np.int32),
        items=items.astype(np.int32),
        timestamps=times.astype(np.int64),
        titles=[f"t{item}" for item in range(num_items)],
        domain="movie",
        used=None if used is None else np.array(used),
    )


def _rows(source: RowSource) -> list[tuple[int, list[int], int]]:
    rows = source.chunk(0, len(source))
    return [(int(rows.users[row]), rows.history(row).tolist(), int(rows.targets[row])) for row in range(len(rows))]


def test_users_split_by_their_first_event() -> None:
    # User 2 comes first, then 0, then 1, whatever their order in the file.
    events = [(0, item, 100 + item) for item in range(4)]
    events += [(1, item, 200 + item) for item in range(4)] + [(2, item, item) for item in range(4)]
    splits, counts = make_sequences(
        _log(events), SequenceRules(ratios=(0.34, 0.34, 0.32), min_history=1, max_history=2)
    )
    assert _rows(splits["train"]) == [(2, [0], 1), (2, [0, 1], 2), (2, [1, 2], 3)]
    assert _rows(splits["val"]) == [(0, [1, 2], 3)]
    assert _rows(splits["test"]) == [(1, [1, 2], 3)]
    keys = [splits[name].chunk(0, len(splits[name])).keys for name in ("train", "val", "test")]
    assert np.concatenate(keys).tolist() == [0, 1, 2, 3, 4]
    assert counts["train_windows"] == 4
    assert counts["train_dropped_short"] == 1
    assert counts["users_without_rows"] == 0


def test_ties_keep_file_order_and_are_counted() -> None:
    events = [(0, 9, 5), (0, 3, 5), (0, 7, 4), (1, 1, 6), (1, 2, 7), (2, 1, 8), (2, 2, 9)]
    splits, counts = make_sequences(_log(events), SequenceRules(ratios=(0.34, 0.34, 0.32), min_history=1))
    assert _rows(splits["train"]) == [(0, [7], 9), (0, [7, 9], 3)]
    assert counts["train_target_time_tied"] == 1
    assert counts["test_target_time_tied"] == 0


def test_leave_last_out() -> None:
    events = [(0, item, item) for item in range(5)] + [(1, 7, 1), (1, 8, 2)]
    splits, counts = make_sequences(_log(events), SequenceRules(split="leave_last_out", min_history=1, max_history=3))
    assert _rows(splits["train"]) == [(0, [0], 1), (0, [0, 1], 2)]
    assert _rows(splits["val"]) == [(0, [0, 1, 2], 3)]
    assert _rows(splits["test"]) == [(0, [1, 2, 3], 4), (1, [7], 8)]
    assert counts["val_dropped_short"] == 1


def test_temporal_split_never_trains_on_later_events() -> None:
    rng = np.random.default_rng(0)
    times = rng.permutation(600)
    log = _log(list(zip(rng.integers(0, 20, 600), rng.integers(0, 50, 600), times, strict=True)))
    splits, _ = make_sequences(log, SequenceRules(split="temporal", min_history=1))
    when = {(int(u), int(t)): int(i) for u, t, i in zip(log.users, log.timestamps, log.items, strict=True)}
    by_user: dict[int, list[tuple[int, int]]] = {}
    for (user, time), item in sorted(when.items()):
        by_user.setdefault(user, []).append((time, item))
    # Times are 0..599, so the cuts lie at 480 and 540.
    expected = {"train": 0, "val": 0, "test": 0}
    for events in by_user.values():
        expected["train"] += sum(time < 480 for time, _ in events[1:])
        expected["val"] += any(480 <= time < 540 for time, _ in events[1:])
        expected["test"] += any(time >= 540 for time, _ in events[1:])
    assert {name: len(rows) for name, rows in splits.items()} == expected
    for user, history, target in _rows(splits["val"]):
        inside = [item for time, item in by_user[user] if time < 540]
        assert target == inside[-1]
        assert history == inside[:-1][-10:]


@settings(deadline=None, max_examples=80)
@given(
    st.lists(
        st.tuples(st.integers(0, 7), st.integers(0, 49), st.integers(0, 20), st.booleans()), min_size=20, max_size=90
    ),
    st.integers(1, 3),
    st.integers(3, 5),
)
def test_user_split_equals_a_plain_loop(
    events: list[tuple[int, int, int, bool]], min_history: int, max_history: int
) -> None:
    rules = SequenceRules(ratios=(0.5, 0.25, 0.25), min_history=min_history, max_history=max_history)
    by_user: dict[int, list[tuple[int, int]]] = {}
    for user, item, time, used in events:
        if used:
            by_user.setdefault(user, []).append((time, item))
    for sequence in by_user.values():
        sequence.sort(key=lambda event: event[0])  # stable
    order = sorted(by_user, key=lambda user: (by_user[user][0][0], user))
    parts = {
        "train": order[: len(order) // 2],
        "val": order[len(order) // 2 : len(order) // 2 + len(order) // 4],
        "test": order[len(order) // 2 + len(order) // 4 :],
    }
    expected: dict[str, list] = {}
    for name, users in parts.items():
        expected[name] = []
        for user in users:
            items = [item for _, item in by_user[user]]
            for place in range(len(items)) if name == "train" else [len(items) - 1]:
                if place >= min_history:
                    expected[name].append((user, items[max(0, place - max_history) : place], items[place]))
    log = _log([event[:3] for event in events], used=[event[3] for event in events])
    if not all(expected.values()):
        with pytest.raises(InputError, match=r"row is left|no event is left"):
            make_sequences(log, rules)
        return
    splits, counts = make_sequences(log, rules)
    assert {name: _rows(rows) for name, rows in splits.items()} == expected
    assert counts["users"] == len(order)


def test_unused_events_make_no_sequence() -> None:
    events = [(user, item, item) for user in range(3) for item in range(4)]
    used = [item != 2 for _ in range(3) for item in range(4)]
    splits, _ = make_sequences(_log(events, used=used), SequenceRules(ratios=(0.34, 0.34, 0.32), min_history=1))
    assert _rows(splits["test"]) == [(2, [0, 1], 3)]


def test_empty_split_and_empty_log_are_errors() -> None:
    log = _log([(user, item, item) for user in range(2) for item in range(4)])
    with pytest.raises(InputError, match="no val row is left: 2 users, 8 events"):
        make_sequences(log, SequenceRules(ratios=(0.6, 0.2, 0.2), min_history=1))
    with pytest.raises(InputError, match="no event is left"):
        make_sequences(_log([(0, 1, 2)], used=[False]), SequenceRules())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratios": (0.5, 0.5, 0.5)}, "ratios"),
        ({"ratios": (1.0, 0.0, 0.0)}, "ratios"),
        ({"min_history": 0}, "min_history 0"),
        ({"min_history": 11}, "min_history 11, max_history 10"),
        ({"split": "random"}, "split 'random'"),
    ],
)
def test_bad_rules(wrong: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SequenceRules(**wrong)


def test_duplicates_and_repeats() -> None:
    log = _log([(0, 1, 9), (0, 1, 5), (0, 1, 5), (0, 2, 5), (1, 1, 5)])
    kept, counts = filter_log(log, FilterRules())
    assert kept.used is not None
    assert kept.used.tolist() == [True, True, False, True, True]
    assert counts["duplicate_events_left_out"] == 1
    first, counts = filter_log(log, FilterRules(repeats="first"))
    assert first.used is not None
    assert first.used.tolist() == [False, True, False, True, True]
    assert counts["repeated_events_left_out"] == 1
    every, _ = filter_log(log, FilterRules(duplicates="keep"))
    assert every.used is not None
    assert every.used.all()


def test_core_is_applied_until_it_holds() -> None:
    # Item 3 has one event; without it user 2 has too few, and then item 4 has.
    events = [(user, item, item) for user in range(2) for item in range(3)]
    events += [(2, 3, 1), (2, 4, 2), (2, 0, 3), (0, 4, 9)]
    log, counts = filter_log(_log(events, num_items=6), FilterRules(min_user_events=3, min_item_events=2))
    assert log.titles == ["t0", "t1", "t2"]
    assert counts["items_left_out"] == 3
    assert counts["users_left_out"] == 1
    assert log.used is not None
    assert log.used.tolist() == [True] * 6 + [False]  # user 2's event of item 0 still excludes it
    assert log.items.tolist() == [0, 1, 2, 0, 1, 2, 0]
    with pytest.raises(InputError, match="no event is left after the filters"):
        filter_log(_log(events, num_items=6), FilterRules(min_user_events=9))
