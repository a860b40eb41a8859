"""The plan: the same steps whoever computes them, every sample once, from any step on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llara_dist.errors import InputError
from llara_dist.hashing import hash64
from llara_dist.stream.plan import Plan
from llara_dist.stream.share import share_out
from tests.unit.sources import ids_of_pass, source

SHARDS = st.lists(st.integers(1, 150), min_size=1, max_size=4)


def lengths_of(ids: np.ndarray) -> np.ndarray:
    return 60 + (hash64(5, ids) % np.uint64(200)).astype(np.int64)


@settings(max_examples=60, deadline=None)
@given(sizes=SHARDS, passes=st.integers(1, 3), batch=st.integers(1, 200), epochs=st.integers(1, 5))
def test_every_sample_of_a_pass_once_an_epoch(sizes, passes, batch, epochs):
    shards = source(sizes, passes)
    plan = Plan([shards], seed=3, global_batch=batch, epochs=epochs)
    assert plan.num_steps == epochs * plan.steps_per_epoch == epochs * -(-sum(sizes) // batch)
    seen: dict[int, list[int]] = {}
    for step in range(plan.num_steps):
        ids = plan.step(step)
        last_of_epoch = (step + 1) % plan.steps_per_epoch == 0
        assert len(ids) == batch or (last_of_epoch and 1 <= len(ids) <= batch)
        seen.setdefault(plan.epoch(step), []).extend(ids.tolist())
    for epoch in range(epochs):
        assert sorted(seen[epoch]) == ids_of_pass(shards, epoch % passes)
    assert plan.repeats_passes == (epochs > passes)


@settings(max_examples=80, deadline=None)
@given(
    sizes=SHARDS,
    batch=st.integers(1, 96),
    nodes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    budget=st.integers(260, 3000),
    lanes=st.sampled_from([1, 8, 128]),
)
def test_steps_do_not_depend_on_who_computes_them(sizes, batch, nodes, budget, lanes):
    plan = Plan([source(sizes)], seed=1, global_batch=batch, epochs=1, lanes=lanes)
    for step in range(min(plan.num_steps, 4)):
        ids = plan.step(step)
        homes = plan.homes(step, sum(nodes))
        assert homes.min() >= 0
        assert homes.max() < sum(nodes)
        shares = share_out(lengths_of(ids), nodes, homes, budget)
        computed = np.concatenate([part for rank in shares.rows for part in rank])
        assert sorted(computed.tolist()) == list(range(len(ids)))


@settings(max_examples=40, deadline=None)
@given(
    sizes=SHARDS,
    batch=st.integers(4, 64),
    epochs=st.integers(1, 3),
    worlds=st.lists(st.sampled_from([(1,), (4,), (2,), (2, 2), (1, 3), (1, 1, 1)]), min_size=2, max_size=4),
    cuts=st.lists(st.floats(0, 1), min_size=3, max_size=3),
)
@example(sizes=[100, 60], batch=16, epochs=2, worlds=[(1,), (4,), (2,)], cuts=[0.3, 0.6, 0.9])
def test_a_change_of_world_goes_on_with_exactly_the_remaining_samples(sizes, batch, epochs, worlds, cuts):
    """Restarts anywhere, each with another world and budget: together the ranks compute the plan's samples, once."""
    shards = source(sizes, passes=2)
    reference = Plan([shards], 9, batch, epochs)
    total = reference.num_steps
    edges = [0, *sorted(int(cut * total) for cut in cuts[: len(worlds) - 1]), total]
    computed: Counter[tuple[int, int]] = Counter()
    for nodes, begin, end in zip(worlds, edges[:-1], edges[1:], strict=True):
        plan = Plan([shards], 9, batch, epochs)  # a fresh process
        for step in range(begin, end):
            ids = plan.step(step)
            np.testing.assert_array_equal(ids, reference.step(step))
            shares = share_out(lengths_of(ids), nodes, plan.homes(step, sum(nodes)), 300 + 100 * len(nodes))
            for rank in shares.rows:
                computed.update((plan.epoch(step), int(number)) for part in rank for number in ids[part])
    expected = {(epoch, number) for epoch in range(epochs) for number in ids_of_pass(shards, epoch % 2)}
    assert set(computed) == expected
    assert set(computed.values()) == {1}


def test_any_step_first_is_the_same_as_in_order():
    shards = source([60, 41], passes=2)
    walked = [Plan([shards], 7, 16, 4).step(step) for step in range(28)]
    for step in (27, 0, 13, 6, 7, 20):
        np.testing.assert_array_equal(Plan([shards], 7, 16, 4).step(step), walked[step])
    jumping = Plan([shards], 7, 16, 4)
    for step in (20, 3, 27, 3, 14):
        np.testing.assert_array_equal(jumping.step(step), walked[step])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(8, 300), min_size=2, max_size=4),
    weights=st.lists(st.sampled_from(["1", "1/2", "0.3", "2", "2.5"]), min_size=4, max_size=4),
    batch=st.integers(1, 70),
    epochs=st.integers(1, 3),
)
def test_a_mixture_is_one_plan(sizes, weights, batch, epochs):
    """Weight w reads w passes; every step holds each source in proportion."""
    sources, first = [], 0
    for size, weight in zip(sizes, weights, strict=False):
        sources.append(source([size], first_id=first, weight=weight, name=str(first)))
        first += size
    plan = Plan(sources, 2, batch, epochs)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    for epoch in range(epochs):
        steps = [step for step in range(plan.num_steps) if plan.epoch(step) == epoch]
        ids = np.concatenate([plan.step(step) for step in steps])
        counts = np.bincount(owner[ids], minlength=len(sizes))
        assert counts.tolist() == [part.epoch_size(epoch) for part in sources]
        for part in sources:
            mine = np.bincount(ids[(ids >= part.first_ids[0]) & (ids < part.first_ids[0] + part.samples[0])])
            if len(mine):
                assert np.ptp(mine[part.first_ids[0] :]) <= (1 if part.weight.denominator == 1 else 2)
        for step in steps[:-1]:
            shares = np.bincount(owner[plan.step(step)], minlength=len(sizes))
            assert (np.abs(shares - batch * counts / counts.sum()) < 3).all()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=5),
    batch=st.integers(1, 90),
    nodes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    lanes=st.sampled_from([4, 32, 128]),
    start=st.floats(0, 0.99),
)
def test_needs_name_every_shard_that_a_node_reads(sizes, batch, nodes, lanes, start):
    sources = [source(sizes, passes=2), source([90], first_id=2 * sum(sizes), weight="1/2")]
    plan = Plan(sources, 4, batch, 3, lanes)
    first_step = int(start * plan.num_steps)
    world, ends = sum(nodes), np.cumsum(nodes)
    starts = np.concatenate([sources[0].first_ids, sources[1].first_ids])
    for node, end in enumerate(ends.tolist()):
        needs = list(plan.needs(first_step, range(end - nodes[node], end), world))
        assert [need[0] for need in needs] == sorted(need[0] for need in needs)
        wanted: dict[int, set[int]] = {}
        for begin, last, number, shard in needs:
            assert begin <= last
            place = shard + number * len(sources[0].first_ids)
            for step in range(max(begin, first_step), last + 1):
                wanted.setdefault(step, set()).add(place)
        for step in range(first_step, plan.num_steps):
            mine = np.searchsorted(ends, plan.homes(step, world), side="right") == node
            read = set((np.searchsorted(starts, plan.step(step)[mine], side="right") - 1).tolist())
            assert read <= wanted.get(step, set())


def test_a_node_reads_the_same_lanes_in_every_step():
    """Eight nodes of eight ranks: an eighth of every step each, and little more than an eighth of the shards."""
    plan = Plan([source([1000] * 64)], 0, 512, 1)
    shards: list[set[int]] = [set() for _ in range(8)]
    for step in range(plan.num_steps - 1):
        nodes = plan.homes(step, 64) // 8
        assert np.bincount(nodes, minlength=8).tolist() == [64] * 8
        for node, number in zip(nodes.tolist(), (plan.step(step) // 1000).tolist(), strict=True):
            shards[node].add(number)
    assert sum(len(found) for found in shards) <= 64 + 7


def test_order_is_frozen():
    """Recorded values: a change here breaks the resuming of every run, and must raise the plan's rules number."""
    plan = Plan([source([10], bytes_per_sample=100_000)], seed=42, global_batch=4, epochs=2, lanes=4)
    assert [plan.step(step).tolist() for step in range(plan.num_steps)] == [
        [1, 8, 6, 5],
        [2, 9, 7, 3],
        [0, 4],
        [1, 6, 8, 5],
        [2, 7, 9, 3],
        [0, 4],
    ]


def test_hash_names_what_decides_the_steps():
    shards = source([50])
    base = Plan([shards], 1, 8, 2)
    assert base.hash == Plan([shards], 1, 8, 2).hash
    others = [Plan([shards], 2, 8, 2), Plan([shards], 1, 9, 2), Plan([shards], 1, 8, 3), Plan([shards], 1, 8, 2, 64)]
    others += [Plan([replace(shards, hash="other")], 1, 8, 2), Plan([replace(shards, weight=Fraction(1, 2))], 1, 8, 2)]
    assert len({plan.hash for plan in [base, *others]}) == 7


def test_input_errors():
    shards = source([20])
    with pytest.raises(InputError, match="at least 1"):
        Plan([shards], 0, 0, 1)
    with pytest.raises(InputError, match="no samples"):
        Plan([source([0])], 0, 4, 1)
    with pytest.raises(InputError, match="power of two"):
        Plan([shards], 0, 4, 1, lanes=100)
    with pytest.raises(InputError, match="at most"):
        Plan([source([2**31])], 0, 4, 1)
    with pytest.raises(IndexError):
        Plan([shards], 0, 4, 1).step(5)
