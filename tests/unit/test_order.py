"""The order of an epoch: blocks, lanes, and which shards lie under a node's lanes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llara_dist.stream.order import BLOCK_BYTES, epoch_order
from tests.unit.sources import ids_of_pass, source

SHARDS = st.lists(st.integers(1, 400), min_size=1, max_size=6)
LANES = st.sampled_from([1, 2, 8, 128])


@settings(max_examples=60, deadline=None)
@given(sizes=SHARDS, passes=st.integers(1, 3), epoch=st.integers(0, 4), lanes=LANES, seed=st.integers(0, 9))
def test_every_sample_of_the_pass_once(sizes, passes, epoch, lanes, seed):
    shards = source(sizes, passes)
    order = epoch_order(shards, 0, epoch, seed, lanes)
    assert len(order) == sum(sizes)
    assert sorted(order.ids(np.arange(len(order))).tolist()) == ids_of_pass(shards, epoch % passes)


@settings(max_examples=60, deadline=None)
@given(sizes=SHARDS, weight=st.fractions("1/7", 4, max_denominator=12), lanes=LANES)
def test_weights_read_every_pass_once_over_the_epochs(sizes, weight, lanes):
    """Weight 1/3: three epochs see every sample once. Weight 2: one epoch sees every sample twice."""
    shards = source(sizes, weight=weight)
    epochs = weight.denominator
    counts = np.zeros(sum(sizes), dtype=int)
    for epoch in range(epochs):
        order = epoch_order(shards, 0, epoch, 3, lanes)
        assert len(order) == shards.epoch_size(epoch)
        assert abs(len(order) - weight * sum(sizes)) < 2 + weight
        np.add.at(counts, order.ids(np.arange(len(order))), 1)
    assert set(counts.tolist()) == {weight.numerator}


def test_a_fraction_is_a_fair_subset_of_whole_blocks():
    shards = source([40_000] * 4, weight="1/4")
    order = epoch_order(shards, 0, 0, seed=5)
    ids = np.sort(order.ids(np.arange(len(order))))
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    assert len(ids) == 40_000
    # All but the two at the cuts are whole, and whole shards come first: little has to be read.
    assert np.mean([len(run) * 2600 >= BLOCK_BYTES for run in runs]) > 0.9
    assert len(set((ids // 40_000).tolist())) <= 2


def test_blocks_are_contiguous_and_large_enough():
    order = epoch_order(source([10_000, 7_000, 50]), 0, 0, seed=1)
    assert (order.lengths * 2600 >= BLOCK_BYTES).sum() == len(order.lengths) - 1  # the shard of 50 is one block
    assert order.lengths.max() * 2600 < 2 * BLOCK_BYTES
    # The blocks of a shard follow each other: a shard is read through before the next one.
    assert len(np.flatnonzero(np.diff(np.searchsorted([10_000, 17_000], order.firsts, side="right")))) == 2
    # Along a lane, neighbours are neighbours in the file but at the edges and turns of blocks.
    lane = order.ids(np.arange(0, len(order), order.lanes))
    assert (np.diff(lane) == 1).mean() > 0.95


@pytest.mark.parametrize("lanes", [1, 4, 128])
def test_any_stretch_draws_equally_from_all_lanes(lanes):
    order = epoch_order(source([5000, 3000]), 0, 0, 0, lanes)
    assert np.ptp(np.diff(order.lane_starts)) <= 1
    assert sorted(order.lane_of_slot.tolist()) == list(range(lanes))
    np.testing.assert_array_equal(order.lane_of_slot[order.lane_of_slot], np.arange(lanes))
    for start in (0, 77, 4000):
        for length in (lanes, 3 * lanes + 5):
            counts = np.bincount(order.lanes_of(np.arange(start, start + length)), minlength=lanes)
            assert np.ptp(counts) <= 1
    # Also a stretch shorter than the lanes is spread over every group of neighbouring lanes.
    if lanes == 128:
        halves = order.lanes_of(np.arange(64, 64 + 16)) // 16
        assert np.bincount(halves, minlength=8).tolist() == [2] * 8


@settings(max_examples=40, deadline=None)
@given(sizes=SHARDS, lanes=LANES, cut=st.floats(0, 1), weight=st.sampled_from(["1", "1/3", "5/2"]))
def test_spans_name_the_shards_under_lanes(sizes, lanes, cut, weight):
    shards = source(sizes, weight=weight)
    order = epoch_order(shards, 0, 1, 4, lanes)
    first, last = sorted((int(cut * lanes), lanes // 2))
    positions = np.arange(len(order))
    positions = positions[(order.lanes_of(positions) >= first) & (order.lanes_of(positions) < last)]
    shard_of = np.searchsorted(np.append(shards.first_ids, sum(sizes)), order.ids(positions), side="right") - 1
    covered = np.zeros(len(positions), dtype=int)
    for shard, begin, end in zip(*order.spans(first, last), strict=True):
        inside = (positions >= begin) & (positions <= end) & (positions % lanes == begin % lanes)
        assert begin % lanes == end % lanes
        assert {int(begin), int(end)} <= set(positions.tolist())
        assert (shard_of[inside] == shard).all()
        covered[inside] += 1
    assert (covered == 1).all()


def test_orders_differ_between_epochs_seeds_and_sources():
    shards = source([3000, 3000])
    base = epoch_order(shards, 0, 0, 1).ids(np.arange(6000))
    for other in (epoch_order(shards, 0, 1, 1), epoch_order(shards, 0, 0, 2), epoch_order(shards, 1, 0, 1)):
        assert (other.ids(np.arange(6000)) == base).mean() < 0.01


def test_two_samples_do_not_keep_company_over_the_epochs():
    """Samples that share a step in one epoch share one in the next no more often than in a uniform shuffle."""
    rows, batch = 6400, 64
    shards = source([rows])
    steps = []
    for epoch in range(2):
        step = np.empty(rows, dtype=int)
        step[epoch_order(shards, 0, epoch, 8).ids(np.arange(rows))] = np.arange(rows) // batch
        steps.append(step)
    together = np.bincount(steps[0] * (rows // batch) + steps[1], minlength=(rows // batch) ** 2)
    pairs = (together * (together - 1) // 2).sum()
    expected = rows * (batch - 1) / 2 * (batch - 1) / (rows - 1)
    assert pairs < 1.5 * expected


def test_the_order_is_frozen():
    """Recorded values: a change here breaks the resuming of every run, and must raise the plan's rules number."""
    order = epoch_order(source([4, 6], bytes_per_sample=10**6, weight=Fraction(3, 2)), 0, 1, 42, lanes=4)
    assert order.ids(np.arange(len(order))).tolist() == [8, 5, 1, 0, 3, 9, 7, 2, 0, 8, 6, 1, 2, 3, 4]
