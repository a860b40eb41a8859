"""A mixture of data sets: one plan, items of the concatenated tables, and a run on it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch

from llara_dist.config import DataConfig
from llara_dist.data.build import build
from llara_dist.data.dataset import load_dataset
from llara_dist.errors import InputError
from llara_dist.recommenders.item_table import load_item_table, write_recommender
from llara_dist.recommenders.joining import join
from llara_dist.recommenders.sasrec import SASRec
from llara_dist.stream.loader import StepLoader
from llara_dist.stream.locations import mix, node_cache, open_samples
from llara_dist.stream.mixture import Mixture
from llara_dist.stream.plan import Plan
from tests.runs import run_config

from . import worlds
from .test_loader import HalfHybrid

CACHE = node_cache(DataConfig())


@pytest.fixture(scope="module")
def root(tmp_path_factory, inputs):
    """The small run's own data set and a second one, built with the same tokenizer, and both recommenders."""
    folder = tmp_path_factory.mktemp("mixture")
    other = worlds.write_world(folder / "data", num_users=25)
    build(other, str(inputs / "llm"), folder / "other", processes=1, passes=2, samples_per_shard=100)
    dataset = load_dataset(other)
    torch.manual_seed(1)
    for name, width in (("rec", 16), ("wide", 24)):
        info = {"model": "sasrec", "dataset_hash": dataset.hash, "scores": {}}
        write_recommender(folder / name, SASRec(dataset.num_items, 10, dim=width), info)
    mix([str(inputs / "shards"), str(folder / "other")], folder / "mix", ["1", "1/2"])
    join([inputs / "rec", folder / "rec"], folder / "joined")
    return folder


def test_items_index_the_joined_table(root, inputs):
    mixture = open_samples(root / "mix", "train", CACHE)
    assert isinstance(mixture, Mixture)
    one, other = mixture.parts
    first = load_dataset(inputs / "data").num_items
    assert mixture.info["num_items"] == first + load_dataset(root / "data").num_items == len(mixture.titles())
    assert [source["item_offset"] for source in mixture.info["sources"]] == [0, first]
    ids = np.array([len(one) + 3, 0, len(one), 5])
    for sample, number, part, offset in zip(
        mixture.read(ids), (3, 0, 0, 5), (other, one, other, one), (first, 0, first, 0), strict=True
    ):
        own = part.read([number])[0]
        np.testing.assert_array_equal(sample.slot_items, own.slot_items + offset)
        np.testing.assert_array_equal(sample.tokens, own.tokens)
    info = mixture.lookup(ids)
    assert info.keys.tolist() == [sample.key for sample in mixture.read(ids)]
    assert len(set(mixture.all.keys.tolist())) == len(one) + len(other) // 2  # two passes of the second source
    joined = load_item_table(root / "joined")
    tables = [load_item_table(inputs / "rec"), load_item_table(root / "rec")]
    torch.testing.assert_close(joined.weight, torch.cat([table.weight for table in tables]))
    assert joined.dataset_hash == mixture.info["dataset"]["hash"]


def test_a_weight_of_a_half_takes_two_epochs_a_pass(root):
    mixture = open_samples(root / "mix", "train", CACHE)
    plan = Plan(mixture.sources, 0, 16, 4)
    seen: Counter[tuple[int, int]] = Counter()
    for step in StepLoader(mixture, plan, HalfHybrid(), rank=0, max_tokens_per_microbatch=4000):
        for batch in step.microbatches:
            seen.update((step.epoch, key) for key in batch.keys.tolist())
    own, other = (len(part) for part in mixture.parts)
    by_source = Counter((epoch, key >> 48) for epoch, key in seen.elements())
    for epoch in range(4):
        assert by_source[epoch, 0] == own
        assert abs(by_source[epoch, 1] - other / 4) <= 1
    # Two epochs read pass 0 of the second source once, the next two pass 1.
    for pair in ((0, 1), (2, 3)):
        keys = Counter(key for epoch, key in seen.elements() if key >> 48 and epoch in pair)
        assert len(keys) == other // 2
        assert set(keys.values()) == {1}


def test_a_run_trains_and_is_evaluated_on_it(root, inputs, tmp_path):
    from llara_dist.evaluation.evaluate import evaluate
    from llara_dist.tuning import train

    config = run_config(inputs, tmp_path / "run", shards=str(root / "mix"), max_steps=3, max_tokens_per_microbatch=1500)
    config = dataclasses.replace(config, recommender=dataclasses.replace(config.recommender, path=root / "joined"))
    train(config)
    mixture = open_samples(root / "mix", "val", CACHE)
    assert isinstance(mixture, Mixture)
    for part in mixture.parts:
        found = evaluate(tmp_path / "run", split="val", generation=False, source=part.info["dataset"]["name"])
        assert found["rows"] == len(part)
    with pytest.raises(InputError, match="rows of 10 and 20 candidates; evaluate one data set at a time"):
        evaluate(tmp_path / "run", split="val", generation=False)
    with pytest.raises(InputError, match="--source nothing: not one of"):
        evaluate(tmp_path / "run", split="val", generation=False, source="nothing")


def test_weights_on_the_command_line(root, inputs, tmp_path):
    """Numbers and fractions in a YAML list."""
    from llara_dist.cli import main

    shards = f"[{inputs / 'shards'}, {root / 'other'}]"
    for number, weights in enumerate(("[1, 0.5]", "[1, 1/2]", "[1.0, 0.50]")):
        main(["shards", "mix", "--shards", shards, "--weights", weights, "--out", str(tmp_path / str(number))])
        info = json.loads((tmp_path / str(number) / "mixture.json").read_text())
        assert [source["weight"] for source in info["sources"]] == ["1", "1/2"]


def test_what_does_not_fit_is_refused(root, inputs, tmp_path):
    with pytest.raises(InputError, match="wide: item vectors of width 24"):
        join([inputs / "rec", root / "wide"], tmp_path / "joined")
    with pytest.raises(InputError, match="2 weights for 1"):
        mix([str(inputs / "shards")], tmp_path / "mix", ["1", "2"])
    with pytest.raises(InputError, match="must be positive"):
        mix([str(inputs / "shards")], tmp_path / "mix", ["0"])
    with pytest.raises(InputError, match="no number"):
        mix([str(inputs / "shards")], tmp_path / "mix", ["much"])
    with pytest.raises(InputError, match="the same data set as"):
        mix([str(inputs / "shards")] * 2, tmp_path / "mix")
    worlds.byte_level(vocabulary=500).save_pretrained(tmp_path / "tokenizer")
    build(root / "data", str(tmp_path / "tokenizer"), tmp_path / "foreign", processes=1)
    with pytest.raises(InputError, match="same --tokenizer"):
        mix([str(inputs / "shards"), str(tmp_path / "foreign")], tmp_path / "mix")
    config = run_config(inputs, tmp_path / "run", shards=str(root / "mix"), max_tokens_per_microbatch=1500)
    from llara_dist.distributed import World
    from llara_dist.training.preflight.examine import open_inputs

    with pytest.raises(InputError, match="trained on data set"):
        open_inputs(config, World())
    assert not (tmp_path / "mix").exists()


def test_a_source_built_again_is_noticed(root, inputs, tmp_path):
    build(root / "data", str(inputs / "llm"), tmp_path / "other", processes=1)
    mix([str(tmp_path / "other")], tmp_path / "mix")
    build(root / "data", str(inputs / "llm"), tmp_path / "other", processes=1, seed=5, overwrite=True)
    with pytest.raises(InputError, match="was built again since"):
        open_samples(tmp_path / "mix", "train", CACHE)
    path = tmp_path / "mix/mixture.json"
    value = json.loads(path.read_text())
    value["sources"][0]["weight"] = "9"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"mixture.json: altered"):
        open_samples(tmp_path / "mix", "train", CACHE)
