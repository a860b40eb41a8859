"""A run made to fit its GPU: what the cost model predicts decides, before a weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from llara_dist import distributed
from llara_dist.config import RunConfig, to_dict
from llara_dist.console import GIB, say, warn
from llara_dist.cost.memory import estimate_run_memory
from llara_dist.cost.recommend import MARGIN, fewest_recomputed
from llara_dist.cost.work import SampleSizes
from llara_dist.distributed import World, pick_device
from llara_dist.ds_config import read_ds_config, zero_stage
from llara_dist.errors import InputError
from llara_dist.model.kernels import settle_memory
from llara_dist.model.llama import compute_dtype, read_llama_config
from llara_dist.recommenders.item_table import load_item_table
from llara_dist.stream.locations import node_cache, open_samples
from llara_dist.stream.reader import Samples
from llara_dist.training.contract import differences
from llara_dist.training.preflight.resources import free_device_bytes

if TYPE_CHECKING:
    from transformers import LlamaConfig

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
        table = load_item_table(config.recommender.path).weight
        ds_config = read_ds_config(config.deepspeed)
        predict = _predictor(llama, shards, table, ds_config, 1, device, compute_dtype(config.model, device))
        room = int((1 - MARGIN) * (free if most_bytes is None else min(free, most_bytes)))
        least = config.data.max_tokens_per_microbatch if keep_budget else shards.longest
        chosen = first_that_fits(variants(config, least, llama.num_hidden_layers), predict, room)
    except (InputError, OSError):
        return config
    changes = differences(to_dict(config), to_dict(chosen))
    if changes:
        need = predict(chosen)
        aim = "to fit one GPU" if need <= room else "to come near to fitting one GPU"
        needed = f"about {need / GIB:.1f} GiB are needed, {room / GIB:.1f} may be used"
        say(f"{aim}, {' and '.join(changes)}: {needed}")
    return chosen


def choose_recomputed(
    config: RunConfig,
    shards: Samples,
    item_table: torch.Tensor,
    ds_config: dict[str, Any],
    world: World,
    device: torch.device,
) -> RunConfig:
    """The run with a number of layers for `model.activation_checkpointing=auto`; says it. Any other run as it is.

    A collective: ranks that recompute different layers would gather ZeRO-3's partitions in different orders, so the one
    with the least room decides for all.

    Args:
        config: the run.
        shards: its training samples.
        item_table: [items, d].
        ds_config: what `read_ds_config` returned.
        world: where this process stands.
        device: of this rank.
    """
    if config.model.activation_checkpointing != "auto":
        return config
    target, free = config.model.memory_target_gib, free_device_bytes(device)
    if free is None:
        count = 0
        told = "recomputing no layer: model.activation_checkpointing=auto looks at a GPU's memory, and this is a CPU"
    else:
        llama = read_llama_config(config.model)
        layers = llama.num_hidden_layers
        room = min(distributed.gather_objects(target * GIB if target > 0 else (1 - MARGIN) * free))
        dtype = compute_dtype(config.model, device)
        predict = _predictor(llama, shards, item_table, ds_config, world.size, device, dtype)
        fewest = fewest_recomputed(layers, lambda count: predict(_recomputing(config, count)), room)
        count = layers if fewest is None else fewest
        told = f"recomputing {count} of {layers} layers to stay under {room / GIB:.1f} GiB"
        if fewest is None and world.is_main:
            warn(f"about {predict(_recomputing(config, layers)) / GIB:.1f} GiB are needed with every layer recomputed")
    if world.is_main:
        say(told)
    return _recomputing(config, count)


def _recomputing(config: RunConfig, layers: int | bool) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, activation_checkpointing=layers))


def _predictor(
    llama: LlamaConfig,
    shards: Samples,
    item_table: torch.Tensor,
    ds_config: dict[str, Any],
    ranks: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[RunConfig], int]:
    """Bytes that a rank of a variant of the run is predicted to need on its device."""
    samples = SampleSizes.of(shards.info, shards.longest)
    table = (item_table.shape[0], item_table.shape[1])

    def predict(tried: RunConfig) -> int:
        settled = dataclasses.replace(tried, kernels=settle_memory(tried.kernels, device, zero_stage(ds_config)))
        memory = estimate_run_memory(
            settled, llama, ds_config, ranks, table, samples, device.type, dtype == torch.bfloat16
        )
        return memory.device_bytes

    return predict


def variants(config: RunConfig, least: int, layers: int) -> Iterator[RunConfig]:
    """The run with less and less memory for its activations, the least change first.

    Layers are recomputed first, one more at a time, which changes no number; then the token budget is halved, down to
    the least.

    Args:
        config: the run; `auto` begins with no layer.
        least: tokens a micro-batch must hold, those of the longest sample.
        layers: of the model.
    """
    asked = config.model.activation_checkpointing
    yield _recomputing(config, False) if asked == "auto" else config
    if asked is not True:
        for count in range(1 if asked == "auto" else asked + 1, layers):
            yield _recomputing(config, count)
    budget = config.data.max_tokens_per_microbatch
    while True:
        data = dataclasses.replace(config.data, max_tokens_per_microbatch=budget)
        yield dataclasses.replace(_recomputing(config, True), data=data)
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
