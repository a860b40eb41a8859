"""What the tests of validation stand on: a small run on the shipped pre-trained base, which really answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from llara_dist.config import RunConfig
from llara_dist.model.tiny import tiny_base
from tests.runs import RECIPE, run_config


def make_answering_inputs(folder: Path) -> None:
    """Fill `folder` with data/ (15 validation rows), rec/ and shards/ for the base's tokenizer."""
    from llara_dist.data.build import build
    from llara_dist.data.dataset import load_dataset
    from llara_dist.data.prepare import prepare
    from llara_dist.recommenders.item_table import write_recommender
    from llara_dist.recommenders.sasrec import SASRec

    recipe = folder / "small.yaml"
    recipe.write_text(RECIPE.replace("num_users: 60", "num_users: 150"))
    prepare(recipe=str(recipe), out=folder / "data")
    dataset = load_dataset(folder / "data")
    torch.manual_seed(0)
    about = {"model": "sasrec", "dataset_hash": dataset.hash, "scores": {}}
    write_recommender(folder / "rec", SASRec(dataset.num_items, 10, dim=16), about)
    build(data=folder / "data", tokenizer=tiny_base(), out=folder / "shards", processes=1)


def answering(inputs: Path, out: Path, **data: Any) -> RunConfig:
    """A run of `run_config` on the shipped base; untuned it names a candidate in most rows, at different lengths."""
    config = run_config(inputs, out, **data)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(tiny_base())))
