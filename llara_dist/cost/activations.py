"""Bytes that the forward pass leaves for the backward pass, op by op, as autograd saves them.

Counted for transformers' Llama under autocast with PEFT's LoRA and this package's packed attention. With T tokens,
h hidden, m intermediate, H query and K key heads of width D, c bytes of a compute element, and P cells of the padded
attention block, a layer saves

- RMS norms: their input in float32 and its root, 2·(4·T·h + 4·T);
- attention: queries, keys, values and result, c·P·D·(2·H + 2·K), and the log-sum-exp, 4·P·H;
- MLP: gate, its SiLU and up, 3·c·T·m;
- adapters: their input and A's output, c·T·(in + r) each; with dropout every adapter has an input of its own and a mask
  (a byte an element on CUDA, four on the CPU), without it q, k, v share one and gate, up share one;
- under bfloat16: the cast copies of the adapters (and of the frozen weights, where these are held in float32).

Outside the layers: the last norm, rotary tables, packing indices, float32 log-probabilities at the answers, the
projector's. With activation checkpointing a layer leaves its input alone, and one layer at a time is whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import Work


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch.

    Attributes:
        layer: what one layer's forward pass saves.
        kept: what stays of one layer until its backward pass: `layer`, or its input under recomputation.
        outside: saved beside the layers.
        total: saved by the whole forward pass.
        workspace: beyond that at the peak: gradients in flight, a dequantised matrix, the head's logits and, under
            recomputation, the one layer that is whole again. A bound, not a count.
    """

    layer: int
    kept: int
    outside: int
    total: int
    workspace: int


def activation_bytes(model: TunedModel, work: Work, device_type: str = "cuda") -> Activations:
    """What one micro-batch needs.

    Args:
        model: what is tuned.
        work: of one micro-batch.
        device_type: cuda or cpu; dropout masks differ.
    """
    shape, compute, tokens = model.architecture, model.compute_bytes, work.tokens
    stream = compute if model.bits != 32 else 4
    layer = _layer_bytes(model, work, device_type)
    casts = 2 * sum(model.adapter_sizes) if model.bfloat16 else 0
    casts += 2 * shape.layer_weights if model.bfloat16 and model.bits == 32 else 0
    kept = stream * tokens * shape.hidden if model.recompute else layer + casts
    outside = (
        4 * tokens * (shape.hidden + 1)
        + 4 * work.answer_tokens * shape.vocabulary
        + 16 * work.answer_tokens
        + compute * work.items * (model.item_dim + 2 * model.projector_hidden)
        + stream * work.slots * shape.hidden
        + 16 * work.slots
    )
    if not model.recompute:
        outside += 2 * stream * tokens * shape.head_dim
        outside += 8 * (work.padded_tokens + tokens) if model.attention == "packed" else 0
    if model.bfloat16:
        outside += 2 * model.projector_hidden * shape.hidden
        outside += 2 * shape.embedding_weights if model.bits == 32 else 0
    total = shape.layers * kept + outside
    largest = max(linear.weights for linear in shape.linears)
    flight = 2 * tokens * (compute * shape.intermediate + 4 * shape.hidden)
    logits = work.answer_tokens * shape.vocabulary * (4 + 2 * compute)
    whole_again = layer + casts if model.recompute else 0
    dequantised = compute * largest if model.bits == 4 else 0
    return Activations(layer + casts, kept, outside, total, max(logits, flight + whole_again) + dequantised)


def _layer_bytes(model: TunedModel, work: Work, device_type: str) -> int:
    """Activations that one layer saves, cast weights not counted."""
    shape, compute, tokens = model.architecture, model.compute_bytes, work.tokens
    norms = 2 * 4 * tokens * (shape.hidden + 1)
    if model.attention == "eager":
        # Softmax in float32, cast to the compute type; queries, and keys and values repeated for every head.
        probabilities = 4 + (compute if model.bfloat16 else 0)
        attention = shape.heads * (probabilities * work.row_pairs + 3 * compute * tokens * shape.head_dim)
    elif model.attention == "sdpa":
        # The mask that transformers makes of position_ids, cast anew in every layer.
        attention = compute * work.row_pairs + 4 * tokens * shape.heads * (compute * shape.head_dim + 1)
    else:
        width = 2 * compute * shape.head_dim * (shape.heads + shape.kv_heads)
        attention = work.padded_tokens * (width + 4 * shape.heads)
    mlp = 3 * compute * tokens * shape.intermediate
    adapted = [linear for linear in shape.linears if linear.name in model.targets]
    # Autocast's casts of activations are not cached; on the CPU, PEFT casts the input to float32 before.
    own_input = model.dropout > 0 or (model.bfloat16 and (model.bits == 32 or device_type == "cpu"))
    sources = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    inputs = {linear.name if own_input else sources.get(linear.name, linear.name): linear.inputs for linear in adapted}
    adapters = compute * tokens * (sum(inputs.values()) + model.rank * len(adapted))
    if model.dropout > 0:
        adapters += (1 if device_type == "cuda" else 4) * tokens * sum(linear.inputs for linear in adapted)
    return norms + attention + mlp + adapters
