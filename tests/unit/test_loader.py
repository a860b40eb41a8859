"""The loader: the planned steps in order, whatever the workers, from any step on, on any number of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from llara_dist.errors import InputError
from llara_dist.hashing import uniform
from llara_dist.stream.loader import Step, StepLoader
from llara_dist.stream.plan import Plan
from llara_dist.stream.reader import ShardSet

from . import worlds


@dataclass(frozen=True)
class HalfHybrid:
    """A draw that worker processes can import."""

    share: float = 0.5

    def __call__(self, step: int, keys: np.ndarray, passes: np.ndarray) -> np.ndarray:
        return uniform(11, step, keys) < self.share


@dataclass(frozen=True)
class BreaksAt:
    """A draw with a programming error at one step."""

    step: int

    def __call__(self, step: int, keys: np.ndarray, passes: np.ndarray) -> np.ndarray:
        if step == self.step:
            raise ZeroDivisionError("planted")
        return np.ones(len(keys), dtype=bool)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("loader")
    return worlds.write_shards(root, num_users=30, samples_per_shard=64) / "shards"


@pytest.fixture
def shards(folder) -> ShardSet:
    return ShardSet.open(folder, "train")


def plan_of(shards: ShardSet) -> Plan:
    return Plan(shards.sources, seed=5, global_batch=24, epochs=3)


def loader(shards: ShardSet, **settings) -> StepLoader:
    return StepLoader(shards, plan_of(shards), HalfHybrid(), **{"max_tokens_per_microbatch": 2500, **settings})


def assert_same(one: Step, other: Step) -> None:
    for name, value in vars(one).items():
        if name == "microbatches":
            continue
        assert np.array_equal(value, getattr(other, name)), name
    assert len(one.microbatches) == len(other.microbatches)
    for left, right in zip(one.microbatches, other.microbatches, strict=True):
        for name, value in vars(left).items():
            found = getattr(right, name)
            assert torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found, name


def test_steps_hold_what_the_plan_says(shards):
    plan = plan_of(shards)
    steps = list(loader(shards))
    assert [step.index for step in steps] == list(range(plan.num_steps)) == list(range(len(loader(shards))))
    for step in steps:
        ids = plan.step(step.index)
        hybrid = HalfHybrid()(step.index, shards.lookup(ids).keys, shards.lookup(ids).passes)
        expected = dict(zip(shards.lookup(ids).keys.tolist(), hybrid.tolist(), strict=True))
        found = {
            key: flag
            for batch in step.microbatches
            if not batch.is_empty
            for key, flag in zip(batch.keys.tolist(), batch.hybrid.tolist(), strict=True)
        }
        assert found == expected
        assert step.epoch == plan.epoch(step.index)
        assert step.samples == len(ids) == len(step.keys)
        assert step.hybrid_samples == hybrid.sum()
        assert step.answer_tokens == sum(batch.answer_tokens for batch in step.microbatches)
        assert step.tokens == sum(batch.num_tokens for batch in step.microbatches if not batch.is_empty)
        assert step.padding_share == 0.0
    assert {len(step.keys) for step in steps} > {24}


@pytest.mark.parametrize("world", [2, 3, 24])
def test_ranks_together_are_one_rank(shards, world):
    alone = list(loader(shards))
    ranks = [list(loader(shards, rank=rank, world_size=world)) for rank in range(world)]
    for index, whole in enumerate(alone):
        parts = [steps[index] for steps in ranks]
        assert len({len(part.microbatches) for part in parts}) == 1
        keys = [batch.keys for part in parts for batch in part.microbatches if not batch.is_empty]
        assert sorted(torch.cat(keys).tolist()) == sorted(whole.keys.tolist())
        flags = [batch.hybrid for part in parts for batch in part.microbatches if not batch.is_empty]
        assert int(torch.cat(flags).sum()) == whole.hybrid_samples
        for part in parts:
            assert (part.samples, part.answer_tokens, part.tokens) == (whole.samples, whole.answer_tokens, whole.tokens)
            np.testing.assert_array_equal(part.keys, whole.keys)
            assert 0 <= part.padding_share < 1
        for batch in [batch for part in parts for batch in part.microbatches]:
            assert len(batch.unique_items) >= 1


def test_resuming_anywhere_continues_exactly(shards):
    """Also across an epoch's end, where the last step is smaller."""
    plan = plan_of(shards)
    whole = list(loader(shards, world_size=2, rank=1))
    assert plan.steps_per_epoch < plan.num_steps
    for first in (1, plan.steps_per_epoch - 1, plan.steps_per_epoch, plan.num_steps - 1, plan.num_steps):
        resumed = list(loader(ShardSet.open(shards.folder), world_size=2, rank=1, first_step=first))
        assert len(resumed) == plan.num_steps - first
        for one, other in zip(whole[first:], resumed, strict=True):
            assert_same(one, other)


def test_stops_where_told(shards):
    assert [step.index for step in loader(shards, first_step=3, last_step=5)] == [3, 4]


def test_workers_change_nothing(shards):
    expected = list(loader(shards, first_step=4, last_step=12))
    for workers in (1, 2):
        found = list(loader(shards, first_step=4, last_step=12, num_workers=workers))
        assert len(found) == 8
        for one, other in zip(expected, found, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_one_clear_line(tmp_path, folder, workers):
    import shutil

    shutil.copytree(folder, tmp_path / "shards")
    path = tmp_path / "shards/train/000001.tar"
    shards = ShardSet.open(tmp_path / "shards")
    offset, key = int(shards.index.shard(1).offsets[7]), int(shards.index.shard(1).keys[7])
    data = bytearray(path.read_bytes())
    data[offset + 30] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        list(loader(shards, num_workers=workers))
    message = str(caught.value)
    assert "\n" not in message
    assert not caught.value.everywhere  # the rank that reads the sample is the only one that can say so
    for part in ("000001.tar", f"offset {offset}", f"key {key}", "altered", "verify"):
        assert part in message


@pytest.mark.parametrize("workers", [0, 1])
def test_programming_errors_come_through(shards, workers):
    broken = StepLoader(shards, plan_of(shards), BreaksAt(1), num_workers=workers)
    with pytest.raises(ZeroDivisionError, match="planted"):
        list(broken)


def test_few_files_stay_open(shards):
    shards._files.most = 2
    ids = np.random.default_rng(0).permutation(len(shards))
    assert [sample.key for sample in shards.read(ids)] == shards.lookup(ids).keys.tolist()
    assert len(shards.manifest["shards"]) > 2 >= len(shards._files)
    shards.close()
    assert len(shards._files) == 0


def test_files_left_behind_are_closed(shards):
    shards.read(shards.first_ids[[0, 1]])
    for _ in range(shards._files.idle):
        shards.read(shards.first_ids[[1]])
    assert len(shards._files) == 2
    shards.read(shards.first_ids[[1]])
    assert len(shards._files) == 1


def test_refused_before_anything_is_read(shards):
    with pytest.raises(InputError, match="25 ranks for a global batch of 24"):
        loader(shards, world_size=25)
    with pytest.raises(InputError, match="longest row"):
        loader(shards, max_tokens_per_microbatch=100)
    with pytest.raises(InputError, match="first step 999"):
        loader(shards, first_step=999)


def test_reading_twice_is_the_same(shards):
    steps = loader(shards, last_step=3)
    for one, other in zip(steps, steps, strict=True):
        assert_same(one, other)


SCRIPT = """
import sys
from llara_dist.stream.loader import StepLoader
from llara_dist.stream.plan import Plan
from llara_dist.stream.reader import ShardSet
import operator

class All:
    def __call__(self, step, keys, passes):
        return keys >= 0

if __name__ == "__main__":
    shards = ShardSet.open(sys.argv[1])
    steps = StepLoader(shards, Plan(shards.sources, 5, 4, 1000), All(), num_workers=1)
    for step in steps:
        print(step.index, flush=True)
"""


def test_interrupting_ends_the_workers_too(folder, tmp_path):
    """Ctrl-C reaches the whole process group; nothing may hang."""
    import signal

    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(folder)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"0\n"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in errors


@pytest.mark.parametrize("nodes", [(1,), (3,), (2, 2), (1, 3, 2)])
def test_one_process_makes_what_all_ranks_make(shards, nodes):
    ranks = range(sum(nodes))
    for index in (0, 3, plan_of(shards).num_steps - 1):
        parts = [loader(shards, rank=rank, world_size=len(ranks), nodes=nodes).maker.make(index) for rank in ranks]
        whole = loader(shards, rank=0, world_size=len(ranks), nodes=nodes).maker.make_whole(index)
        together = [batch for part in parts for batch in part.microbatches]
        assert whole.places == [(rank, turn) for rank in ranks for turn in range(len(parts[0].microbatches))]
        assert whole.places == [place for part in parts for place in part.places]
        assert_same(replace(whole, places=[]), replace(parts[0], microbatches=together, places=[]))
