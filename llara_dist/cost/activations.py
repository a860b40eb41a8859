"""Bytes that the forward pass leaves for the backward pass, op by op, as autograd saves them.

Counted for transformers' Llama under autocast with LoRA and this package's packed attention. With T tokens,
h hidden, m intermediate, H query and K key heads of width D, c bytes of a compute element, and R rows that ask (T but
in a last layer that computes the answers' alone), a layer saves

- RMS norms: their input in float32 and its root, 4·(T + R)·(h + 1); Liger's the input as it comes;
- attention: queries and result, 2·c·R·D·H, keys and values, 2·c·T·D·K, and the log-sum-exp, 4·R·H; with fewer rows than
  keys its mask on the CPU;
- MLP: gate, its SiLU and up, 3·c·R·m; Liger makes the SiLU anew in the backward pass, 2·c·R·m;
- adapters: their input and A's output, c·R·(in + r) each (k and v: T), where q, k, v share one input (q has its own
  where R < T) and gate, up share one; fused ones keep nothing else, and the input uncast. With PEFT's and dropout every
  adapter has an input of its own and a mask (a byte an element on CUDA, four on the CPU);
- under bfloat16: the cast copies of PEFT's adapters (and of the frozen weights, where these are held in float32).

Outside the layers: the last norm, rotary tables, where the answers' rows lie, float32 log-probabilities at the answers,
the projector's. Of a recomputed layer only its input stays. One of them at a time is whole again, when the layers that
are not recomputed, all after it, have given theirs back.

Of the flash kernels, which run on a GPU alone, the result is also the input of the output projection, and saved once
unless PEFT's dropout copies it; counted as on the CPU, it is counted twice (c·T·D·H a layer too many).
"""

from __future__ import annotations

from dataclasses import dataclass

from llara_dist.cost.flops import KEYS_AND_VALUES, last_rows
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import Work


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch.

    Attributes:
        layer: what one layer's forward pass saves, of those that compute every position.
        layers: what all layers' forward passes save, recomputed or not.
        kept: what stays of the layers until their backward pass: of those that are recomputed their inputs.
        outside: saved beside the layers.
        total: saved by the whole forward pass.
        workspace: beyond that at the peak: gradients in flight, a dequantised matrix, the head's logits, and what the
            one recomputed layer that is whole again needs beyond those that kept everything. A bound, not a count.
    """

    layer: int
    layers: int
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
    stream = model.stream_bytes
    rows = last_rows(model, work)
    layer = _layer_bytes(model, work, tokens, device_type)
    casts = 2 * sum(model.adapter_sizes) if model.bfloat16 and model.lora == "peft" else 0
    casts += 2 * shape.layer_weights if model.bfloat16 and model.bits == 32 else 0
    layers = (shape.layers - 1) * layer + _layer_bytes(model, work, rows, device_type) + shape.layers * casts
    again = layers if model.recomputed == shape.layers else model.recomputed * (layer + casts)
    kept = layers - again + model.recomputed * stream * tokens * shape.hidden
    outside = (
        _norm_bytes(model, rows)
        + 4 * work.answer_tokens * shape.vocabulary
        + 16 * work.answer_tokens
        + compute * work.items * (model.item_dim + 2 * model.projector_hidden)
        + stream * work.slots * shape.hidden
        + 16 * work.slots
    )
    if model.recomputed < shape.layers:
        outside += 2 * stream * tokens * shape.head_dim
        outside += (2 * stream * shape.head_dim + 8) * rows if model.answers_only else 0
    if model.bfloat16:
        outside += 2 * model.projector_hidden * shape.hidden
        outside += 2 * shape.embedding_weights if model.bits == 32 else 0
    total = kept + outside
    largest = max(linear.weights for linear in shape.linears)
    flight = 2 * tokens * (compute * shape.intermediate + 4 * shape.hidden)
    logits = work.answer_tokens * shape.vocabulary * (4 + 2 * compute)
    whole_again = max(0, layer + casts - (layers - again)) if model.recomputed else 0
    dequantised = compute * largest if model.bits == 4 else 0
    return Activations(layer + casts, layers, kept, outside, total, max(logits, flight + whole_again) + dequantised)


def _norm_bytes(model: TunedModel, rows: int) -> int:
    """What RMS norms of so many rows save."""
    element = model.stream_bytes if model.layers == "liger" else 4
    return rows * (element * model.architecture.hidden + 4)


def _layer_bytes(model: TunedModel, work: Work, rows: int, device_type: str) -> int:
    """Activations that one layer saves of which so many rows ask, cast weights not counted."""
    shape, compute, tokens = model.architecture, model.compute_bytes, work.tokens
    norms = _norm_bytes(model, tokens + rows)
    if model.attention == "eager":
        # Softmax in float32, cast to the compute type; queries, and keys and values repeated for every head.
        probabilities = 4 + (compute if model.bfloat16 else 0)
        attention = shape.heads * (probabilities * work.row_pairs + 3 * compute * tokens * shape.head_dim)
    elif model.attention == "sdpa":
        # The mask that transformers makes of position_ids, cast anew in every layer.
        attention = compute * work.row_pairs + 4 * tokens * shape.heads * (compute * shape.head_dim + 1)
    else:
        attention = 2 * compute * shape.head_dim * (shape.heads * rows + shape.kv_heads * tokens)
        attention += 4 * shape.heads * rows
        attention += compute * work.answer_pairs if rows < tokens and device_type == "cpu" else 0
    mlp = (2 if model.layers == "liger" else 3) * compute * rows * shape.intermediate
    adapted = [linear for linear in shape.linears if linear.name in model.targets]
    # Autocast's casts of activations are not cached; on the CPU, PEFT casts the input to float32 before.
    peft_casts = model.bfloat16 and (model.bits == 32 or device_type == "cpu")
    own_input = model.lora == "peft" and (model.dropout > 0 or peft_casts)
    sources = {"v_proj": "k_proj", "up_proj": "gate_proj"} | (
        {"k_proj": "q_proj", "v_proj": "q_proj"} if rows == tokens else {}
    )
    inputs = {}
    adapters = 0
    for linear in adapted:
        positions = tokens if linear.name in KEYS_AND_VALUES else rows
        inputs[linear.name if own_input else sources.get(linear.name, linear.name)] = positions * linear.inputs
        adapters += compute * positions * model.rank
        if model.lora == "peft" and model.dropout > 0:
            adapters += (1 if device_type == "cuda" else 4) * positions * linear.inputs
    if model.attention == "sdpa" and not own_input:
        inputs.pop("o_proj", None)  # the result of attention, saved there
    adapters += compute * sum(inputs.values())
    if model.lora == "fused" and model.bfloat16 and model.bits == 32:
        # What the norms give is float32 then, and kept as it is.
        adapters += 2 * sum(size for name, size in inputs.items() if name not in ("o_proj", "down_proj"))
    return norms + attention + mlp + adapters
