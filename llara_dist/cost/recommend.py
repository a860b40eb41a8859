"""Which ZeRO stage, token budget and recomputation: what fits and is predicted to be fastest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llara_dist.cost.memory import RunMemory, run_memory
from llara_dist.cost.predict import Cluster, StepTime, predict_step
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import SampleSizes
from llara_dist.cost.zero import ZeroSettings

MARGIN = 0.08
"""share of the device's memory that stays free: the estimate is not validated on GPUs"""
BUDGETS = tuple(1024 * 2**power for power in range(6))
"""token budgets of a micro-batch that are tried"""
WORTH = 1.05
"""a larger budget, or no recomputation, must be predicted so much faster than what needs less memory"""


@dataclass(frozen=True)
class Recommendation:
    """Settings of a run, and why.

    Attributes:
        stage: ZeRO.
        tokens_per_microbatch: budget of a packed row.
        recompute: activation checkpointing.
        memory: predicted with them.
        step: predicted with them.
        reasons: in words.
    """

    stage: int
    tokens_per_microbatch: int
    recompute: bool
    memory: RunMemory
    step: StepTime
    reasons: list[str]


def recommend(
    model: TunedModel,
    cluster: Cluster,
    samples: SampleSizes,
    global_batch: int,
    stages: dict[int, ZeroSettings],
    budgets: Iterable[int] = BUDGETS,
) -> Recommendation | None:
    """The smallest stage that fits, with the budget and recomputation that are predicted fastest on it.

    A higher stage saves little here (adapters are small) and communicates more, so it is taken only where the lower
    ones do not fit. Stage 0 is for one rank alone: stage 1 partitions moments at the price of one all-gather a step.

    Args:
        model: what is tuned; its `recompute` is tried both ways.
        cluster: hardware, ranks and nodes.
        samples: lengths of a sample.
        global_batch: samples of a step.
        stages: settings by stage; those of the checkout's ds_configs.
        budgets: tokens of a micro-batch to try.

    Returns:
        None where nothing fits.
    """
    room = (1 - MARGIN) * cluster.hardware.memory_bytes
    tried = [0] if cluster.ranks == 1 else [1, 2, 3]
    for stage in tried:
        best: Recommendation | None = None
        for recompute in (True, False):
            held = dataclasses.replace(model, recompute=recompute)
            for budget in sorted(budgets):
                if budget < samples.longest:
                    continue
                row = samples.largest_row(budget, math.ceil(global_batch / cluster.ranks), model.items)
                memory = run_memory(held, row, stages[stage], cluster.ranks)
                if memory.device_bytes > room:
                    break
                step = predict_step(held, stages[stage], cluster, samples, global_batch, budget)
                if best is None or step.tokens_per_s > WORTH * best.step.tokens_per_s:
                    best = Recommendation(stage, budget, recompute, memory, step, [])
        if best is not None:
            return dataclasses.replace(best, reasons=_reasons(best, tried, cluster))
    return None


def _reasons(found: Recommendation, tried: list[int], cluster: Cluster) -> list[str]:
    used, total = found.memory.device_bytes / 2**30, cluster.hardware.memory_bytes / 2**30
    if found.stage == 0:
        first = "one GPU: nothing to partition, stage 0"
    elif found.stage == tried[0]:
        first = f"ZeRO-{found.stage} is the smallest stage that fits; higher ones would only communicate more"
    else:
        first = f"ZeRO-{found.stage}: the stages below it do not fit"
    held = "layers are recomputed" if found.recompute else "activations are kept"
    why = "keeping them would not fit or not be faster" if found.recompute else "recomputing would be slower"
    return [
        first,
        f"{found.tokens_per_microbatch} tokens a micro-batch: a larger budget does not fit or gains less than "
        f"{WORTH - 1:.0%}",
        f"{held}: {why}",
        f"{used:.1f} of {total:.1f} GiB, {MARGIN:.0%} kept free",
    ]


def as_json(found: Recommendation) -> dict[str, Any]:
    """The settings by their names in a run's configuration, and the reasons."""
    return {
        "deepspeed": f"ds_configs/zero{found.stage}.json",
        "data.max_tokens_per_microbatch": found.tokens_per_microbatch,
        "model.activation_checkpointing": found.recompute,
        "reasons": found.reasons,
    }
