"""Who computes what: within the budget, balanced, equally many micro-batches on every rank, rows on their node."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llara_dist.errors import InputError
from llara_dist.stream.share import check_world, share_out


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 260), min_size=0, max_size=120),
    nodes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    budget=st.integers(260, 2000),
    data=st.data(),
)
def test_rows_stay_within_budget_and_node(lengths, nodes, budget, data):
    world = sum(nodes)
    homes = np.array([data.draw(st.integers(0, world - 1)) for _ in lengths], dtype=np.int64)
    shares = share_out(np.array(lengths, dtype=np.int64), nodes, homes, budget)
    assert len(shares.rows) == world == len(shares.loads)
    assert {len(rank) for rank in shares.rows} == {shares.loads.shape[1]}
    node_of = np.repeat(np.arange(len(nodes)), nodes)
    seen = []
    for rank, parts in enumerate(shares.rows):
        for turn, part in enumerate(parts):
            assert part.dtype == np.int64
            assert (np.diff(part) > 0).all()
            load = sum(lengths[row] for row in part)
            assert load == shares.loads[rank, turn] <= budget
            if len(nodes) > 1:
                assert (node_of[homes[part]] == node_of[rank]).all()
            seen += part.tolist()
    assert sorted(seen) == list(range(len(lengths)))


def test_one_rank_asks_for_its_own_rows():
    lengths = np.arange(40, 100)
    whole = share_out(lengths, [2, 3], np.arange(60) % 5, 500)
    for rank in range(5):
        mine = share_out(lengths, [2, 3], np.arange(60) % 5, 500, only=rank)
        np.testing.assert_array_equal(mine.loads, whole.loads)
        assert [part.tolist() for part in mine.rows[rank]] == [part.tolist() for part in whole.rows[rank]]
        assert all(not mine.rows[other] for other in range(5) if other != rank)


@pytest.mark.parametrize(("nodes", "budget"), [([1], 4096), ([4], 4096), ([8], 2048), ([64], 8192), ([8] * 4, 8192)])
def test_work_is_balanced(nodes, budget):
    world = sum(nodes)
    lengths = np.random.default_rng(3).integers(60, 260, 512)
    homes = np.arange(512) * world // 512
    loads = share_out(lengths, nodes, homes, budget).loads
    assert 1 - loads.sum() / (world * loads.max(axis=0).sum()) < (0.03 if len(nodes) == 1 else 0.12)
    assert loads.shape[1] <= -(-lengths.sum() // (world * budget)) + 1


def rows_of(lengths: list[int], world: int, budget: int) -> list[list[list[int]]]:
    return [[part.tolist() for part in rank] for rank in share_out(np.array(lengths), [world], None, budget).rows]


def test_microbatches_are_filled():
    """One row a micro-batch where two do not fit, no more micro-batches than needed where they do."""
    assert rows_of([90, 80, 70, 60], 1, 100)[0] == [[0], [1], [2], [3]]
    assert sorted(rows_of([90, 10, 80, 20], 1, 100)[0]) == [[0, 1], [2, 3]]


def test_awkward_lengths_pack_quickly_and_tightly():
    """A third of the budget and a little: three do not fit, where the sum alone would promise them to."""
    started = time.process_time()  # of this process: other work on the machine is no loss of speed
    shares = share_out(np.full(8192, 1400), [2], None, 4096)
    assert time.process_time() - started < 2
    assert [len(rank) for rank in shares.rows] == [2048, 2048]
    assert sorted(sorted(part) for part in rows_of([60, 50, 40, 30, 20], 1, 100)[0]) == [[0, 2], [1, 3, 4]]


def test_fewer_samples_than_ranks_leaves_empty_microbatches():
    rows = rows_of([50, 40, 30], 5, 100)
    assert [len(rank) for rank in rows] == [1] * 5
    assert sorted(len(rank[0]) for rank in rows) == [0, 0, 1, 1, 1]


def test_input_errors():
    with pytest.raises(InputError, match="9 ranks for a global batch of 8"):
        check_world(250, 8, 9, 4096)
    with pytest.raises(InputError, match="max_tokens_per_microbatch is 100"):
        check_world(250, 8, 2, 100)
    check_world(250, 8, 8, 4096)
    with pytest.raises(InputError, match="does not fit max_tokens_per_microbatch = 100"):
        share_out(np.array([50, 101]), [1], None, 100)
