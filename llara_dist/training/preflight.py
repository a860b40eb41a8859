"""What can be known to be wrong before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llara_dist.config import RunConfig
from llara_dist.data.tokenizer import load_tokenizer, tokenizer_hash
from llara_dist.distributed import World
from llara_dist.ds_config import read_ds_config
from llara_dist.errors import InputError
from llara_dist.model.llama import read_llama_config
from llara_dist.recommenders.item_table import ItemTable, load_item_table
from llara_dist.stream.locations import node_cache, open_samples
from llara_dist.stream.plan import Plan
from llara_dist.stream.reader import Samples
from llara_dist.stream.share import check_world
from llara_dist.training import debug
from llara_dist.training.checkpoint import Checkpoint, newest_checkpoint


@dataclass(frozen=True)
class Inputs:
    """Everything a run stands on, opened and found consistent.

    Attributes:
        shards: the training samples.
        plan: which samples make which step.
        item_table: behaviour embeddings before projection.
        ds_config: as DeepSpeed will get it, less what is ours.
        checkpoint: to go on from, or None.
        total_steps: T.
    """

    shards: Samples
    plan: Plan
    item_table: ItemTable
    ds_config: dict[str, Any]
    checkpoint: Checkpoint | None
    total_steps: int


def open_inputs(config: RunConfig, world: World) -> Inputs:
    """Open shards, item table, ds_config and checkpoint, and check that they belong together.

    Raises:
        InputError: the first thing found wrong, with what to do about it.
    """
    config.require_inputs()
    ds_config = read_ds_config(config.deepspeed)
    shards = open_samples(config.data.shards, "train", node_cache(config.data))
    check_language_model(config, shards)
    item_table = load_item_table(config.recommender.path)
    check_recommender(config, shards, item_table)
    check_world(shards.longest, config.data.global_batch_samples, world.size, config.data.max_tokens_per_microbatch)
    plan = Plan(shards.sources, config.seed, config.data.global_batch_samples, config.data.epochs, config.data.lanes)
    checkpoint = newest_checkpoint(config.out / "checkpoints") if config.resume == "auto" else None
    holds_run = any((config.out / name).exists() for name in ("metrics.jsonl", "checkpoints"))
    if config.resume == "no" and holds_run and not (config.out / debug.MARK).is_dir():
        raise InputError(f"{config.out}: holds a run already; choose another --out, or go on with --resume auto")
    total = min(plan.num_steps, config.data.max_steps) if config.data.max_steps else plan.num_steps
    return Inputs(shards, plan, item_table, ds_config, checkpoint, total)


def check_language_model(config: RunConfig, shards: Samples) -> None:
    """The model's tokenizer is the shards', and its context holds their longest row.

    Raises:
        InputError: it is not, or does not.
    """
    architecture = read_llama_config(config.model)
    found = tokenizer_hash(load_tokenizer(config.model.path))
    if found != shards.info["tokenizer_hash"]:
        raise InputError(
            f"model.path={config.model.path}: its tokenizer ({found[:12]}) is not the one that {config.data.shards} "
            f"was built with ({shards.info['tokenizer_hash'][:12]}); build them again with this model as --tokenizer"
        )
    if architecture.max_position_embeddings < shards.longest:
        raise InputError(
            f"model.path={config.model.path}: context of {architecture.max_position_embeddings} tokens is shorter than "
            f"the longest row of {config.data.shards}, {shards.longest} tokens; build them with a smaller --max-tokens"
        )


def check_recommender(config: RunConfig, shards: Samples, item_table: ItemTable) -> None:
    """The item table was trained on the data set that the shards were built from.

    Published weights name no data set: there the number of items is all that can be compared.

    Raises:
        InputError: it was not.
    """
    trained_on = item_table.dataset_hash
    if trained_on is not None and trained_on != shards.info["dataset"]["hash"]:
        raise InputError(
            f"recommender.path={config.recommender.path}: trained on data set {trained_on[:12]}, {config.data.shards} "
            f"was built from {shards.info['dataset']['hash'][:12]}; train the recommender on the same dataset folder"
        )
    if item_table.weight.shape[0] != shards.info["num_items"]:
        raise InputError(
            f"recommender.path={config.recommender.path}: {item_table.weight.shape[0]} items, "
            f"{config.data.shards} has {shards.info['num_items']}"
        )
