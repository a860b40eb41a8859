"""Whether model, shards and recommender belong together, and DeepSpeed takes the ds_config."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llara_dist.config import RunConfig
from llara_dist.data.tokenizer import load_tokenizer, tokenizer_hash
from llara_dist.ds_config import CHECK, nearest
from llara_dist.errors import Finding, InputError
from llara_dist.model.llama import read_llama_config
from llara_dist.recommenders.item_table import ItemTable
from llara_dist.stream.reader import Samples

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig


def check_language_model(config: RunConfig, shards: Samples) -> None:
    """The model's tokenizer is the shards', and its context holds their longest row.

    Raises:
        InputError: it is not, or does not.
    """
    check_context(config, read_llama_config(config.model), shards)
    check_tokenizer(config, shards)


def check_tokenizer(config: RunConfig, shards: Samples) -> str:
    """The model's tokenizer is the one that the shards were built with; returns the hash of both.

    Raises:
        InputError: it is another.
    """
    found = tokenizer_hash(load_tokenizer(config.model.path, config.model.revision))
    if found != shards.info["tokenizer_hash"]:
        raise InputError(
            f"model.path={config.model.path}: its tokenizer ({found[:12]}) is not the one that {config.data.shards} "
            f"was built with ({shards.info['tokenizer_hash'][:12]}); build them again with this model as --tokenizer"
        )
    return found


def check_context(config: RunConfig, architecture: LlamaConfig, shards: Samples) -> int:
    """The model's context holds the shards' longest row; returns the context in tokens.

    Raises:
        InputError: it does not.
    """
    if architecture.max_position_embeddings < shards.longest:
        raise InputError(
            f"model.path={config.model.path}: context of {architecture.max_position_embeddings} tokens is shorter than "
            f"the longest row of {config.data.shards}, {shards.longest} tokens; build them with a smaller --max-tokens"
        )
    return architecture.max_position_embeddings


def check_recommender(config: RunConfig, shards: Samples, item_table: ItemTable) -> ItemTable:
    """The item table was trained on the data set that the shards were built from; returns it.

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
            f"{config.data.shards} has {shards.info['num_items']}; train the recommender on the same dataset folder"
        )
    return item_table


def check_zero_section(
    ds_config: dict[str, Any], shown: str, device: torch.device, said: Sequence[Finding] = ()
) -> list[Finding]:
    """What DeepSpeed itself does not take of `zero_optimization`: names it has not, values out of range.

    Args:
        ds_config: as loaded.
        shown: its path, for messages.
        device: of this rank; DeepSpeed decides on import what it drives.
        said: what was found already; the keys that it names are left out.
    """
    zero = ds_config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return []
    named = {key for finding in said for key in re.findall(r"zero_optimization\.(\w+)", finding.found)}
    zero = {key: value for key, value in zero.items() if key not in named}
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        known = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
        found = []
        for part in error.errors():
            name = ".".join(str(step) for step in part["loc"])
            close = nearest(name, known) if part["type"] == "extra_forbidden" else ""
            found.append(Finding(CHECK, f"{shown}: zero_optimization.{name}: {part['msg']}{close}", "see ds_configs/"))
        return found
    return []
