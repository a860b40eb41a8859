"""The plan: the same steps whoever computes them, every sample once, equal passes on every rank."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llara_dist.errors import InputError
from llara_dist.hashing import hash64
from llara_dist.stream.plan import Plan, check_world, share_out


@dataclass(frozen=True)
class Table:
    """Samples as a plan sees them."""

    keys: np.ndarray
    passes: np.ndarray
    tokens: np.ndarray
    slots: np.ndarray
    answer_tokens: np.ndarray
    num_passes: int
    hash: str = "h"


def table(rows: int, passes: int = 1) -> Table:
    n = rows * passes
    noise = hash64(5, np.arange(n)).astype(np.int64) & 0xFFFF
    return Table(
        keys=np.tile(np.arange(rows, dtype=np.uint64), passes),
        passes=np.repeat(np.arange(passes, dtype=np.int16), rows),
        tokens=(60 + noise % 200).astype(np.int32),
        slots=(23 + noise % 8).astype(np.int32),
        answer_tokens=(2 + noise % 7).astype(np.int32),
        num_passes=passes,
    )


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 300), passes=st.integers(1, 3), batch=st.integers(1, 64), epochs=st.integers(1, 5))
def test_every_sample_of_a_pass_once_an_epoch(rows, passes, batch, epochs):
    samples = table(rows, passes)
    plan = Plan(samples, seed=3, global_batch=batch, epochs=epochs)
    assert plan.num_steps == epochs * plan.steps_per_epoch == epochs * -(-rows // batch)
    seen: dict[int, list[int]] = {}
    for step in range(plan.num_steps):
        ids = plan.step(step)
        last_of_epoch = (step + 1) % plan.steps_per_epoch == 0
        assert len(ids) == batch or (last_of_epoch and 1 <= len(ids) <= batch)
        seen.setdefault(plan.epoch(step), []).extend(ids.tolist())
    for epoch in range(epochs):
        assert sorted(seen[epoch]) == np.flatnonzero(samples.passes == epoch % passes).tolist()
    assert plan.repeats_passes == (epochs > passes)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 200),
    batch=st.integers(1, 96),
    world=st.integers(1, 9),
    budget=st.integers(260, 3000),
    share=st.floats(0, 1),
)
def test_steps_do_not_depend_on_who_computes_them(rows, batch, world, budget, share):
    samples = table(rows)
    plan = Plan(samples, seed=1, global_batch=batch, epochs=1)
    for step in range(min(plan.num_steps, 4)):
        ids = plan.step(step)
        hybrid = (hash64(9, step, samples.keys[ids]) % np.uint64(1000)) < share * 1000
        shares = plan.microbatches(step, hybrid, world, budget)
        assert len(shares) == world
        assert len({len(rank) for rank in shares}) == 1
        computed = np.concatenate([part for rank in shares for part in rank])
        assert sorted(computed.tolist()) == list(range(len(ids)))
        lengths = samples.tokens[ids] - np.where(hybrid, 0, samples.slots[ids])
        for rank in shares:
            for part in rank:
                assert part.dtype == np.int64
                assert (np.diff(part) > 0).all()
                assert lengths[part].sum() <= budget


def test_any_step_first_is_the_same_as_in_order():
    samples = table(101, 2)
    walked = [Plan(samples, 7, 16, 4).step(step) for step in range(28)]
    for step in (27, 0, 13, 6, 7, 20):
        np.testing.assert_array_equal(Plan(samples, 7, 16, 4).step(step), walked[step])
    jumping = Plan(samples, 7, 16, 4)
    for step in (20, 3, 27, 3, 14):
        np.testing.assert_array_equal(jumping.step(step), walked[step])


def test_orders_differ_between_epochs_and_seeds():
    samples = table(500)
    plan, other = Plan(samples, 1, 500, 2), Plan(samples, 2, 500, 2)
    assert not np.array_equal(plan.step(0), plan.step(1))
    assert not np.array_equal(plan.step(0), other.step(0))
    assert abs(np.corrcoef(plan.step(0), np.arange(500))[0, 1]) < 0.2


def test_order_is_frozen():
    """Recorded values: a change here breaks the resuming of every run, and must raise the plan's rules number."""
    plan = Plan(table(10), seed=42, global_batch=4, epochs=2)
    steps = [plan.step(step).tolist() for step in range(plan.num_steps)]
    assert steps == [[6, 5, 9, 8], [0, 7, 1, 2], [3, 4], [9, 7, 2, 8], [5, 4, 1, 3], [0, 6]]


def test_hash_names_what_decides_the_steps():
    samples = table(50)
    base = Plan(samples, 1, 8, 2)
    assert base.hash == Plan(samples, 1, 8, 2).hash
    others = [Plan(samples, 2, 8, 2), Plan(samples, 1, 9, 2), Plan(samples, 1, 8, 3)]
    others.append(Plan(Table(**{**vars(samples), "hash": "other"}), 1, 8, 2))
    assert len({plan.hash for plan in [base, *others]}) == 5


@pytest.mark.parametrize(("world", "budget"), [(1, 4096), (4, 4096), (8, 2048), (64, 8192)])
def test_work_is_balanced(world, budget):
    samples = table(4096)
    plan = Plan(samples, 0, 512, 1)
    for step in range(4):
        lengths = samples.tokens[plan.step(step)]
        shares = plan.microbatches(step, np.ones(512, dtype=bool), world, budget)
        loads = np.array([[lengths[part].sum() for part in rank] for rank in shares])
        assert 1 - loads.sum() / (world * loads.max(axis=0).sum()) < 0.03
        fewest = -(-lengths.sum() // (world * budget))
        assert loads.shape[1] <= fewest + 1


def test_microbatches_are_filled():
    """One row a micro-batch where two do not fit, no more micro-batches than needed where they do."""
    shares = share_out(np.array([90, 80, 70, 60]), world_size=1, max_tokens=100)
    assert [part.tolist() for part in shares[0]] == [[0], [1], [2], [3]]
    shares = share_out(np.array([90, 10, 80, 20]), world_size=1, max_tokens=100)
    assert sorted(part.tolist() for part in shares[0]) == [[0, 1], [2, 3]]


def test_awkward_lengths_pack_quickly_and_tightly():
    """A third of the budget and a little: three do not fit, where the sum alone would promise them to."""
    lengths = np.full(8192, 1400)
    started = time.perf_counter()
    shares = share_out(lengths, world_size=2, max_tokens=4096)
    assert time.perf_counter() - started < 2
    assert [len(rank) for rank in shares] == [2048, 2048]
    shares = share_out(np.array([60, 50, 40, 30, 20]), world_size=1, max_tokens=100)
    assert sorted(sorted(part.tolist()) for part in shares[0]) == [[0, 2], [1, 3, 4]]


def test_fewer_samples_than_ranks_leaves_empty_microbatches():
    shares = share_out(np.array([50, 40, 30]), world_size=5, max_tokens=100)
    assert [len(rank) for rank in shares] == [1] * 5
    assert sorted(len(rank[0]) for rank in shares) == [0, 0, 1, 1, 1]


def test_input_errors():
    samples = table(20)
    with pytest.raises(InputError, match="9 ranks for a global batch of 8"):
        check_world(samples, 8, 9, 4096)
    with pytest.raises(InputError, match="max_tokens_per_microbatch is 100"):
        check_world(samples, 8, 2, 100)
    check_world(samples, 8, 8, 4096)
    with pytest.raises(InputError, match="does not fit max_tokens_per_microbatch = 100"):
        share_out(np.array([50, 101]), 1, 100)
    with pytest.raises(InputError, match="at least 1"):
        Plan(samples, 0, 0, 1)
    with pytest.raises(InputError, match="no samples"):
        Plan(table(0), 0, 4, 1)
    with pytest.raises(IndexError):
        Plan(samples, 0, 4, 1).step(5)


def test_planning_costs_little():
    """A step of 128 over 8 ranks is planned far within the 2 ms that a step can spare; 20 ms leaves room for noise."""
    samples = table(100_000)
    plan = Plan(samples, 0, 128, 1)
    plan.step(0)
    flags = np.ones(128, dtype=bool)
    fastest = min(_seconds(lambda: plan.microbatches(700, flags, 8, 8192)) for _ in range(20))
    assert fastest < 0.02


def _seconds(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
