"""Inputs of a whole run, made from the synthetic world: data set, tokenizer, Llama, recommender, shards."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from llara_dist.config import (
    CheckpointConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RecommenderConfig,
    RunConfig,
)
from tests.tiny import write_llama, write_tokenizer

ROOT = Path(__file__).parents[1]

RECIPE = """
name: small
domain: movie
source:
  kind: synthetic
  settings: {seed: 5, num_users: 60, num_items: 40}
titles: {drop_year: false, move_articles: false}
candidates: {count: 10}
"""


def make_inputs(folder: Path) -> None:
    """Fill `folder` with data/, llm/, rec/ and shards/: a small run's inputs through the real commands."""
    from llara_dist.data.build import build
    from llara_dist.data.dataset import load_dataset
    from llara_dist.data.prepare import prepare
    from llara_dist.recommenders.item_table import write_recommender
    from llara_dist.recommenders.sasrec import SASRec

    recipe = folder / "small.yaml"
    recipe.write_text(RECIPE)
    prepare(recipe=str(recipe), out=folder / "data")
    dataset = load_dataset(folder / "data")
    write_tokenizer(folder / "llm", dataset.titles, 450)
    write_llama(folder / "llm", vocabulary=450)
    torch.manual_seed(0)
    write_recommender(
        folder / "rec",
        SASRec(dataset.num_items, 10, dim=16),
        {"model": "sasrec", "dataset_hash": dataset.hash, "scores": {}},
    )
    build(data=folder / "data", tokenizer=folder / "llm", out=folder / "shards", processes=1)


def run_config(inputs: Path, out: Path, stage: str = "zero0", **data: Any) -> RunConfig:
    """A small NF4 + LoRA run at dropout 0: several uneven micro-batches a step, a short last step of each epoch."""
    settings = DataConfig(
        shards=str(inputs / "shards"), epochs=3, global_batch_samples=7, max_tokens_per_microbatch=600, workers=0
    )
    return RunConfig(
        model=ModelConfig(path=str(inputs / "llm"), bits=4),
        lora=LoraConfig(dropout=0.0),
        recommender=RecommenderConfig(path=inputs / "rec"),
        data=dataclasses.replace(settings, **data),
        optimizer=OptimizerConfig(lora_lr=2e-3, projector_lr=2e-3),
        checkpoint=CheckpointConfig(every_steps=0),
        deepspeed=ROOT / "ds_configs" / f"{stage}.json",
        out=out,
        device="cpu",
    )
