"""A run made to fit one GPU: what the cost model predicts decides, before a weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch

from llara_dist.config import RunConfig, to_dict
from llara_dist.console import say
from llara_dist.cost.memory import GIB, estimate_run_memory
from llara_dist.cost.recommend import MARGIN
from llara_dist.cost.work import SampleSizes
from llara_dist.distributed import World, pick_device
from llara_dist.ds_config import read_ds_config
from llara_dist.errors import InputError
from llara_dist.model.llama import compute_dtype, read_llama_config
from llara_dist.recommenders.item_table import load_item_table
from llara_dist.stream.locations import node_cache, open_samples
from llara_dist.training.contract import differences
from llara_dist.training.preflight.resources import free_device_bytes

DEBUG_BYTES = 16 * GIB
"""of a GPU that a debug run shall fit on, whatever the cluster's have"""


def fit_device(config: RunConfig, most_bytes: int | None = None, keep_budget: bool = False) -> RunConfig:
    """The run with what has to be changed to fit the GPU of this process alone; says what. On the CPU nothing is.

    Weights are not read. Where an input is missing or wrong nothing is changed: preflight tells of it.

    Args:
        config: the run, on one rank.
        most_bytes: to be used even if more is free; None = what is free.
        keep_budget: whether micro-batches must stay as they are.
    """
    try:
        device = pick_device(config.device, World())
        free = free_device_bytes(device)
        if free is None:
            return config
        llama = read_llama_config(config.model)
        shards = open_samples(config.data.shards, "train", node_cache(config.data))
        items, width = load_item_table(config.recommender.path).weight.shape
        ds_config = read_ds_config(config.deepspeed)
        bfloat16 = compute_dtype(config.model, device) == torch.bfloat16
        samples = SampleSizes.of(shards.info, shards.longest)

        def predict(tried: RunConfig) -> int:
            table = (items, width)
            return estimate_run_memory(tried, llama, ds_config, 1, table, samples, device.type, bfloat16).device_bytes

        room = int((1 - MARGIN) * (free if most_bytes is None else min(free, most_bytes)))
        least = config.data.max_tokens_per_microbatch if keep_budget else samples.longest
        chosen = first_that_fits(variants(config, least), predict, room)
    except (InputError, OSError):
        return config
    changes = differences(to_dict(config), to_dict(chosen))
    if changes:
        need = predict(chosen)
        aim = "to fit one GPU" if need <= room else "to come near to fitting one GPU"
        needed = f"about {need / GIB:.1f} GiB are needed, {room / GIB:.1f} may be used"
        say(f"{aim}, {' and '.join(changes)}: {needed}")
    return chosen


def variants(config: RunConfig, least: int) -> Iterator[RunConfig]:
    """The run with less and less memory for its activations, the least change first.

    Layers are recomputed first, which changes no number; then the token budget is halved, down to the least.

    Args:
        config: the run.
        least: tokens a micro-batch must hold, those of the longest sample.
    """
    yield config
    model = dataclasses.replace(config.model, activation_checkpointing=True)
    budget = config.data.max_tokens_per_microbatch
    while True:
        yield dataclasses.replace(
            config, model=model, data=dataclasses.replace(config.data, max_tokens_per_microbatch=budget)
        )
        if budget <= least:
            return
        budget = max(budget // 2, least)


def first_that_fits(tried: Iterable[RunConfig], predict: Callable[[RunConfig], int], room: int) -> RunConfig:
    """The first variant that is predicted to fit, or the last.

    Args:
        tried: at least one.
        predict: bytes on the device.
        room: bytes that may be used.
    """
    variant = None
    for variant in tried:
        if predict(variant) <= room:
            break
    assert variant is not None
    return variant
