"""Which ZeRO stage, token budget and recomputation: what fits and is predicted to be fastest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llara_dist.cost.memory import RunMemory, run_memory
from llara_dist.cost.predict import Cluster, StepTime, predict_step
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import SampleSizes, Work
from llara_dist.cost.zero import ZeroSettings

MARGIN = 0.08
"""share of the device's memory that stays free: the estimate is not validated on GPUs"""
BUDGETS = tuple(1024 * 2**power for power in range(6))
"""token budgets of a micro-batch that are tried"""
WORTH = 1.05
"""a larger budget, or fewer recomputed layers, must be predicted so much faster than what needs less memory"""


@dataclass(frozen=True)
class Recommendation:
    """Settings of a run, and why.

    Attributes:
        stage: ZeRO.
        tokens_per_microbatch: budget of a packed row.
        recompute: layers that are recomputed.
        memory: predicted with them.
        step: predicted with them.
        reasons: in words.
    """

    stage: int
    tokens_per_microbatch: int
    recompute: int
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
    """The smallest stage that fits and is not predicted slower, with the budget and recomputation fastest on it.

    A higher stage saves little here (adapters are small) and communicates more, so it is taken only where the lower
    ones do not fit, or leave so little memory that their steps are slower.

    Args:
        model: what is tuned; its `recompute` is chosen here.
        cluster: hardware, ranks and nodes.
        samples: lengths of a sample.
        global_batch: samples of a step.
        stages: settings by stage; those of the checkout's ds_configs.
        budgets: tokens of a micro-batch to try.

    Returns:
        None where nothing fits.
    """
    tried = [0] if cluster.ranks == 1 else sorted(stages)
    found = [_best(model, cluster, samples, global_batch, stage, stages[stage], budgets) for stage in tried]
    fitting = [best for best in found if best is not None]
    for place, best in enumerate(fitting):
        fastest = max(other.step.tokens_per_s for other in fitting[place:])
        if fastest <= WORTH * best.step.tokens_per_s:
            return dataclasses.replace(best, reasons=_reasons(best, fitting, cluster))
    return None


def _best(
    model: TunedModel,
    cluster: Cluster,
    samples: SampleSizes,
    global_batch: int,
    stage: int,
    zero: ZeroSettings,
    budgets: Iterable[int],
) -> Recommendation | None:
    """What is fastest under one stage, None where nothing fits."""
    room = (1 - MARGIN) * cluster.hardware.memory_bytes
    share = math.ceil(global_batch / cluster.ranks)
    best: Recommendation | None = None
    tried: list[tuple[TunedModel, int, RunMemory]] = []
    for budget in sorted(budgets):
        if budget < samples.longest:
            continue
        row = samples.largest_row(budget, share, model.items)
        fewest = fewest_recomputed(
            model.architecture.layers,
            lambda count, row=row: _memory(model, count, row, zero, cluster.ranks).device_bytes,
            room,
        )
        if fewest is None:
            break
        # A last layer that computes the answers' rows keeps so little that to recompute it only costs memory.
        layers = model.architecture.layers
        for count in {layers, max(layers - 1, fewest), fewest}:
            memory = _memory(model, count, row, zero, cluster.ranks)
            if memory.device_bytes <= room:
                tried.append((dataclasses.replace(model, recompute=count), budget, memory))
    for held, budget, memory in sorted(tried, key=lambda one: one[2].device_bytes):
        step = predict_step(held, zero, cluster, samples, global_batch, budget)
        if best is None or step.tokens_per_s > WORTH * best.step.tokens_per_s:
            best = Recommendation(stage, budget, held.recomputed, memory, step, [])
    return best


def _memory(model: TunedModel, recompute: int, row: Work, zero: ZeroSettings, ranks: int) -> RunMemory:
    return run_memory(dataclasses.replace(model, recompute=recompute), row, zero, ranks)


def fewest_recomputed(layers: int, need: Callable[[int], int], room: float) -> int | None:
    """The fewest layers whose recomputation makes a run fit; None where none does.

    Args:
        layers: of the model.
        need: bytes on the device with so many layers recomputed.
        room: bytes that may be used.
    """
    return next((count for count in range(layers + 1) if need(count) <= room), None)


def _reasons(found: Recommendation, fitting: list[Recommendation], cluster: Cluster) -> list[str]:
    used, total = found.memory.device_bytes / 2**30, cluster.hardware.memory_bytes / 2**30
    below = [best.stage for best in fitting if best.stage < found.stage]
    if found.stage == 0:
        first = "one GPU: nothing to partition" if cluster.ranks == 1 else "stage 0 fits: nothing need be partitioned"
    elif below:
        first = f"ZeRO-{found.stage}: a stage below it fits, but is predicted slower in the memory that it leaves"
    else:
        first = f"ZeRO-{found.stage}: the stages below it do not fit"
    beside = []
    first_partitioned = next((best for best in fitting if best.stage == 1), None)
    if found.stage == 0 and first_partitioned is not None:
        slower = first_partitioned.step.seconds / found.step.seconds - 1
        more = (first_partitioned.memory.device_bytes - found.memory.device_bytes) / 2**20
        beside = [f"measure ZeRO-1 too: at its best predicted {slower:+.1%} step time and {more:+.0f} MiB a GPU"]
    held = f"layers recomputed: {found.recompute}" if found.recompute else "activations are kept"
    why = "fewer would not fit or not be faster" if found.recompute else "recomputing would be slower"
    return [
        first,
        *beside,
        f"{found.tokens_per_microbatch} tokens a micro-batch: a larger budget does not fit or gains less than "
        f"{WORTH - 1:.0%}",
        f"{held}: {why}",
        f"{used:.1f} of {total:.1f} GiB, {MARGIN:.0%} kept free",
    ]


def as_json(found: Recommendation) -> dict[str, Any]:
    """The settings by their names in a run's configuration, what is predicted with them, and the reasons."""
    return {
        "deepspeed": f"ds_configs/zero{found.stage}.json",
        "data.max_tokens_per_microbatch": found.tokens_per_microbatch,
        "model.activation_checkpointing": found.recompute,
        "predicted": {
            "tokens_per_s": found.step.tokens_per_s,
            "step_s": found.step.seconds,
            "device_bytes": found.memory.device_bytes,
        },
        "reasons": found.reasons,
    }
