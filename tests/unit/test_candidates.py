"""Candidates: what they hold, and that nothing but (seed, draw, key, exclusions) decides them."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llara_dist.data.candidates import draw_candidates
from llara_dist.errors import InputError


def _problem(n: int, num_items: int, most: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, most + 1, n)
    offsets = np.concatenate([[0], lengths.cumsum()])
    items = rng.integers(0, num_items, offsets[-1]).astype(np.int32)
    return np.arange(100, 100 + n, dtype=np.uint64), rng.integers(0, num_items, n).astype(np.int32), offsets, items


def _check(drawn: np.ndarray, targets: np.ndarray, offsets: np.ndarray, items: np.ndarray, num_items: int) -> None:
    assert drawn.dtype == np.int32
    assert drawn.min() >= 0
    assert drawn.max() < num_items
    for row, shown in enumerate(drawn.tolist()):
        assert len(set(shown)) == len(shown)
        assert targets[row] in shown
        excluded = set(items[offsets[row] : offsets[row + 1]].tolist()) - {targets[row]}
        assert not excluded & set(shown)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**63), st.integers(30, 200), st.integers(2, 20), st.integers(0, 3))
def test_rows_hold_target_and_allowed_items(seed: int, num_items: int, count: int, draw: int) -> None:
    # Up to num_items - 20 distinct exclusions: both the sparse and the dense way of drawing are taken.
    keys, targets, offsets, items = _problem(40, num_items, num_items - count - 1, seed % 1000)
    drawn = draw_candidates(keys, targets, offsets, items, num_items, count, seed, draw)
    assert drawn.shape == (40, count)
    _check(drawn, targets, offsets, items, num_items)


def test_a_row_does_not_depend_on_the_others() -> None:
    keys, targets, offsets, items = _problem(9000, 300, 250)
    whole = draw_candidates(keys, targets, offsets, items, 300, 20, 7, 1)
    some = np.array([8999, 0, 4095, 4096, 17])
    lengths = np.diff(offsets)[some]
    apart = np.concatenate([items[offsets[row] : offsets[row + 1]] for row in some])
    again = draw_candidates(keys[some], targets[some], np.append(0, lengths.cumsum()), apart, 300, 20, 7, 1)
    assert (again == whole[some]).all()
    # Nor on the order or the repeats of the exclusions.
    order = np.concatenate([np.arange(offsets[r], offsets[r + 1])[::-1] for r in some])
    twice = np.concatenate([items[order], items[order]])
    where = np.argsort(np.tile(np.repeat(np.arange(5), lengths), 2), kind="stable")
    doubled = draw_candidates(
        keys[some], targets[some], np.append(0, (2 * lengths).cumsum()), twice[where], 300, 20, 7, 1
    )
    assert (doubled == again).all()


def test_seed_draw_and_key_decide() -> None:
    keys, targets, offsets, items = _problem(50, 500, 30)
    first = draw_candidates(keys, targets, offsets, items, 500, 20, 0, 0)
    assert (first == draw_candidates(keys, targets, offsets, items, 500, 20, 0, 0)).all()
    for other in (
        draw_candidates(keys, targets, offsets, items, 500, 20, 1, 0),
        draw_candidates(keys, targets, offsets, items, 500, 20, 0, 1),
        draw_candidates(keys + np.uint64(1000), targets, offsets, items, 500, 20, 0, 0),
    ):
        assert (np.sort(other) != np.sort(first)).any(axis=1).all()


def test_draws_are_pinned() -> None:
    """Frozen candidates must never change between releases: results could no longer be compared."""
    drawn = draw_candidates(np.array([5], np.uint64), np.array([3]), np.array([0, 2]), np.array([1, 2]), 100, 5, 0, 0)
    assert drawn.tolist() == [[3, 12, 59, 43, 9]]


def test_target_place_and_negatives_are_uniform() -> None:
    n, num_items, count = 20_000, 50, 10
    keys = np.arange(n, dtype=np.uint64)
    none = np.zeros(0, np.int32)
    drawn = draw_candidates(keys, np.zeros(n, np.int32), np.zeros(n + 1, np.int64), none, num_items, count, 0, 0)
    places = np.bincount((drawn == 0).argmax(axis=1), minlength=count)
    assert ((places - n / count) ** 2 / (n / count)).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001
    shown = np.bincount(drawn.ravel(), minlength=num_items)[1:]
    expected = n * (count - 1) / (num_items - 1)
    assert (abs(shown / expected - 1) < 0.08).all()


def test_too_few_items_left_is_an_error() -> None:
    keys, targets = np.array([9], np.uint64), np.array([0], np.int32)
    excluded = np.arange(95, dtype=np.int32)
    with pytest.raises(InputError, match=r"row 9: only 5 of 100 items are left as negatives, 19 are needed"):
        draw_candidates(keys, targets, np.array([0, 95]), excluded, 100, 20, 0, 0)
    exact = draw_candidates(keys, targets, np.array([0, 95]), excluded, 100, 6, 0, 0)
    assert set(exact[0].tolist()) == {0, 95, 96, 97, 98, 99}
    with pytest.raises(InputError, match="num_candidates 20"):
        draw_candidates(keys, targets, np.array([0, 0]), excluded[:0], 10, 20, 0, 0)


def test_speed_is_that_of_arrays() -> None:
    keys, targets, offsets, items = _problem(20_000, 2000, 300)
    began = time.process_time()  # of this process: other work on the machine is no loss of speed
    draw_candidates(keys, targets, offsets, items, 2000, 20, 0, 0)
    # 150,000 rows/s were measured on one core; a loop over rows in Python stays below 10,000.
    assert 20_000 / (time.process_time() - began) > 15_000


def test_no_rows() -> None:
    none = np.zeros(0, np.int32)
    drawn = draw_candidates(none.astype(np.uint64), none, np.zeros(1, np.int64), none, 50, 20, 0, 0)
    assert drawn.shape == (0, 20)
