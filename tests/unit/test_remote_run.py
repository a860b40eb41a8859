"""Runs on shards behind a URL: the same steps, each shard fetched once, what a node needs and no more."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llara_dist.config import DataConfig
from llara_dist.data.build import build
from llara_dist.errors import InputError
from llara_dist.stream.loader import StepLoader
from llara_dist.stream.locations import mix, node_cache, open_samples
from llara_dist.stream.lookahead import held_at_once, start_lookahead
from llara_dist.stream.plan import Plan
from tests.runs import run_config
from tests.servers import FaultyServer

from . import worlds
from .test_loader import HalfHybrid, assert_same


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    root = tmp_path_factory.mktemp("remote")
    return worlds.write_shards(root, num_users=30, samples_per_shard=64) / "shards"


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    server = FaultyServer()
    server.files |= {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def server(local):
    with serving(local) as running:
        yield running


def tars(server: FaultyServer) -> dict[str, int]:
    """How often each shard was asked for."""
    return {name: count for name, count in server.asked.items() if name.endswith(".tar")}


def opened(location, folder, **settings):
    return open_samples(location, "train", node_cache(DataConfig(cache=folder, **settings)))


def plan_of(samples):
    return Plan(samples.sources, seed=5, global_batch=24, epochs=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_steps_as_from_a_folder(local, server, tmp_path, workers):
    here, there = opened(local, tmp_path / "none"), opened(server.url, tmp_path / "cache")
    settings = {"max_tokens_per_microbatch": 2500, "num_workers": workers, "last_step": 30}
    steps = range(30)
    lookahead = start_lookahead(there, plan_of(there), DataConfig(cache=tmp_path / "cache"), steps, range(1), 1)
    expected = StepLoader(here, plan_of(here), HalfHybrid(), **settings)
    found = StepLoader(there, plan_of(there), HalfHybrid(), lookahead=lookahead, **settings)
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)
    assert set(tars(server).values()) == {1}
    assert len(tars(server)) > 5
    assert not (tmp_path / "none").exists()


def test_a_node_fetches_only_its_shards(local, server, tmp_path):
    """Two nodes of one rank: together little more than the data, and the same samples as one rank alone."""
    alone = list(StepLoader(opened(local, tmp_path / "none"), plan_of(opened(local, tmp_path)), HalfHybrid()))
    keys: list[list[int]] = [[] for _ in alone]
    fetched = 0
    for rank in range(2):
        samples = opened(server.url, tmp_path / f"node-{rank}")
        ranks = StepLoader(samples, plan_of(samples), HalfHybrid(), rank=rank, world_size=2, nodes=(1, 1))
        for step in ranks:
            keys[step.index] += [
                key for batch in step.microbatches if not batch.is_empty for key in batch.keys.tolist()
            ]
            assert len(step.microbatches) == 1
        fetched += len(tars(server))
        server.asked.clear()
    for whole, both in zip(alone, keys, strict=True):
        assert sorted(both) == sorted(whole.keys.tolist())
    shards = len(opened(local, tmp_path).manifest["shards"])
    assert shards <= fetched <= shards * 2 * 0.9


def test_a_damaged_copy_is_fetched_again(local, server, tmp_path):
    samples = opened(server.url, tmp_path / "cache")
    first = samples.read([0])[0]
    copy = tmp_path / "cache" / samples.manifest["shards"][0]["sha256"]
    data = bytearray(copy.read_bytes())
    data[600] ^= 1
    copy.chmod(0o644)
    copy.write_bytes(data)
    again = opened(server.url, tmp_path / "cache").read([0])[0]
    np.testing.assert_array_equal(again.tokens, first.tokens)
    assert tars(server) == {"train/000000.tar": 2}


def test_a_limit_below_what_a_step_needs_is_refused(server, tmp_path):
    samples = opened(server.url, tmp_path / "cache")
    plan = plan_of(samples)
    needed = held_at_once(plan, range(plan.num_steps), range(1), 1)
    assert needed >= max(shard["bytes"] for shard in samples.manifest["shards"])
    tight = DataConfig(cache=tmp_path / "cache", cache_limit_gib=needed / 2**31)
    with pytest.raises(InputError, match=r"data\.cache_limit_gib"):
        start_lookahead(samples, plan, tight, range(plan.num_steps), range(1), 1)


def test_a_mixture_of_a_folder_and_a_url(local, server, tmp_path, inputs):
    build(inputs / "data", str(local.parent / "tokenizer"), tmp_path / "own", processes=1)
    mix([str(tmp_path / "own"), server.url], tmp_path / "mix")
    samples = opened(tmp_path / "mix", tmp_path / "cache")
    assert len(samples.read([0, len(samples) - 1])) == 2
    assert sum(tars(server).values()) == 1


def test_a_run_on_a_url_is_the_run_on_the_folder(inputs, tmp_path):
    from llara_dist.tuning import train

    with serving(inputs / "shards") as server:
        remote = run_config(inputs, tmp_path / "remote", shards=server.url, max_steps=4)
        remote = dataclasses.replace(remote, data=dataclasses.replace(remote.data, cache=tmp_path / "cache"))
        found = train(remote)
    expected = train(run_config(inputs, tmp_path / "local", max_steps=4))
    assert found["loss"] == expected["loss"]
