"""Collectives of one optimizer step, by ZeRO stage, as DeepSpeed 0.19 makes them; float32 for what trains.

With P trained elements, W ranks and M micro-batches of a step:

- stage 0: one all-reduce of 4P bytes after the last micro-batch;
- stage 1: the same, then an all-gather of 4P;
- stage 2: an all-reduce of 4P after every micro-batch (each rank keeps its part of the result), then the all-gather;
- stage 3: a reduce-scatter of 4P after every micro-batch; an all-gather of every partitioned parameter in each forward
  and each backward pass, and once more where layers are recomputed; what stays whole (persistence threshold), frozen
  tensors too, is gathered once a step, after the update.

Under stage 3 a parameter stays gathered between its forward and its backward use if fewer than
`stage3_max_reuse_distance` elements are used in between, or if the prefetch has seen it. That is exact where it keeps
all (small models) or nothing; between the two the kept share is an approximation. Recomputation releases what it
gathered of frozen layers, whatever the distance.

The scalars that ranks agree on (loss, overflow, norm) are not counted as bytes: SCALARS a step, for their latency.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from llara_dist.cost.collectives import Traffic
from llara_dist.cost.memory import element_bytes
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.zero import STAGE0_BUCKET, ZeroSettings

SCALARS = 4
"""all-reduces of a few bytes in an optimizer step"""
ALIGNMENT = 2
"""elements to which DeepSpeed aligns every rank's part of a flat group (stages 1 and 2)"""


def step_traffic(model: TunedModel, zero: ZeroSettings, world_size: int, microbatches: int) -> Traffic:
    """Payload of one optimizer step in steady state, of one rank.

    Args:
        model: what is tuned.
        zero: from the ds_config.
        world_size: W.
        microbatches: M, forward and backward passes of a step; equal on every rank.
    """
    traffic = Traffic()
    if world_size == 1:
        return traffic
    trained = 4 * model.trainable
    if zero.stage == 0:
        traffic.add("all_reduce", trained, math.ceil(model.trainable / STAGE0_BUCKET))
    elif zero.stage in (1, 2):
        passes = microbatches if zero.stage == 2 else 1
        traffic.add("all_reduce", passes * trained, passes * math.ceil(model.trainable / zero.reduce_bucket))
        unit = ALIGNMENT * world_size
        for group in (model.adapter_weights, model.projector_weights):
            traffic.add("all_gather", 4 * unit * math.ceil(group / unit))
    else:
        buckets = math.ceil(model.trainable / zero.reduce_bucket)
        traffic.add("reduce_scatter", microbatches * trained, microbatches * buckets)
        _add_gathers(traffic, model, zero, microbatches)
    return traffic


def _add_gathers(traffic: Traffic, model: TunedModel, zero: ZeroSettings, microbatches: int) -> None:
    """The all-gathers of stage 3: partitioned parameters in every pass, persistent ones once a step."""
    parameters = _parameters(model)
    persistent = _Sum.of(p for p in parameters if p.elements <= zero.persistence)
    partitioned = [p for p in parameters if p.elements > zero.persistence]
    backward = _Sum.of(p for p in partitioned if p.use != "input")
    anew = 1.0 - _kept_share(backward.elements, zero)
    gathered = _Sum.of(partitioned) + backward.times(anew)
    if model.architecture.tied and anew > 0:
        # The embedding is gathered as the input and again as the head.
        gathered += _Sum.of(p for p in partitioned if p.use == "input and head")
    again = model.recomputed / model.architecture.layers
    gathered += _Sum.of(p for p in partitioned if p.use == "frozen layer").times(again)
    gathered += _Sum.of(p for p in partitioned if p.use == "trained layer").times(again * anew)
    calls = math.ceil(gathered.elements / zero.prefetch_bucket) if zero.prefetch_bucket else gathered.tensors
    traffic.add("all_gather", microbatches * round(gathered.bytes), microbatches * round(calls))
    traffic.add("all_gather", round(persistent.bytes), round(persistent.tensors))


@dataclass(frozen=True)
class _Parameter:
    """One parameter as DeepSpeed counts it: its elements, bytes of one, and where it is used."""

    elements: int
    size: int
    use: Literal["input", "input and head", "head", "frozen layer", "trained layer", "projector"]


@dataclass(frozen=True)
class _Sum:
    """Tensors, elements and bytes of some parameters, or a share of them."""

    tensors: float
    elements: float
    bytes: float

    @classmethod
    def of(cls, parameters: Iterable[_Parameter]) -> _Sum:
        chosen = list(parameters)
        return cls(len(chosen), sum(p.elements for p in chosen), sum(p.elements * p.size for p in chosen))

    def times(self, share: float) -> _Sum:
        return _Sum(share * self.tensors, share * self.elements, share * self.bytes)

    def __add__(self, other: _Sum) -> _Sum:
        return _Sum(self.tensors + other.tensors, self.elements + other.elements, self.bytes + other.bytes)


def _parameters(model: TunedModel) -> list[_Parameter]:
    """Every parameter; the quantisation constants are none."""
    shape, held = model.architecture, element_bytes(model)
    layer = []
    for linear in shape.linears:
        packed = (math.ceil(linear.weights / 2), 1) if model.bits == 4 else (linear.weights, held)
        layer.append(_Parameter(*packed, "frozen layer"))
        layer += [_Parameter(linear.outputs, held, "frozen layer")] if linear.bias else []
    layer += [_Parameter(shape.hidden, held, "frozen layer")] * 2
    layer += [_Parameter(size, 4, "trained layer") for size in model.adapter_sizes]
    ends = [_Parameter(shape.embedding_weights, held, "input and head" if shape.tied else "input")]
    ends += [_Parameter(shape.hidden, held, "head")]
    ends += [] if shape.tied else [_Parameter(shape.head_weights, held, "head")]
    return layer * shape.layers + ends + [_Parameter(size, 4, "projector") for size in model.projector_sizes]


def _kept_share(elements: float, zero: ZeroSettings) -> float:
    """Share of the parameters that stay gathered from their forward to their backward use: the last ones."""
    reach = zero.max_reuse_distance // 2 + zero.prefetch_bucket
    return min(1.0, reach / elements) if elements else 1.0
