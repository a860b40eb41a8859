"""Arithmetic of a step, counted from the sizes of its micro-batches.

One multiply-add is two FLOPs. Per token, with n elements in the frozen linear maps and a in the adapters:

- frozen linear maps: 2n forward, 2n backward (the input's gradient; frozen weights have none);
- adapters: 2a forward, 4a backward (input and weight);
- attention, per layer and (query, key) pair: 4·H·D forward (scores and mixture), 8·H·D backward;
- head, per answer token only: 2·h·V forward, 2·h·V backward;
- projector, per distinct item: 2·(d·m + m·h) forward, 2·d·m + 4·m·h backward (the item table has no gradient).

The gradient reaches the first layer's input because the projector is trained, so no layer's backward is saved. Where
the last layer computes only what answers need, all of its maps but k and v count the answers' rows instead of the
tokens, and its attention those rows' pairs. Norms, rotary embeddings, activations, dropout and softmax are left out
(under 1 % at Llama's widths).

`model` counts each thing once and attention for the pairs that exist (causal, per sample): divided by time and peak it
is the model FLOPs utilisation (MFU). `hardware` adds what the implementation computes beyond that: the forward pass of
recomputed layers again, masked pairs where rows are not packed, and scores recomputed in attention's
backward pass (10·H·D instead of 8·H·D a pair).
"""

from __future__ import annotations

from dataclasses import dataclass

from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import Work


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of forward and backward passes over some work.

    Attributes:
        linears: frozen linear maps of the layers.
        adapters: LoRA.
        attention: scores and mixture over existing pairs.
        head: at the answers.
        projector: for the distinct items.
        hardware: all of them as they are really computed: recomputation and masked pairs included.
    """

    linears: int
    adapters: int
    attention: int
    head: int
    projector: int
    hardware: int

    @property
    def model(self) -> int:
        """What the mathematics needs: the numerator of MFU."""
        return self.linears + self.adapters + self.attention + self.head + self.projector


KEYS_AND_VALUES = ("k_proj", "v_proj")
"""the maps that a last layer for answers only still computes at every position"""


def last_rows(model: TunedModel, work: Work) -> int:
    """Positions of which the last layer computes queries, output and MLP."""
    return work.answer_rows if model.answers_only else work.tokens


def step_flops(model: TunedModel, work: Work) -> StepFlops:
    """FLOPs of the forward and backward passes of one rank over its micro-batches.

    Args:
        model: what is tuned.
        work: the micro-batches' sizes, summed: `Work.of(step.microbatches)`.
    """
    shape = model.architecture
    rows = (shape.layers - 1) * work.tokens + last_rows(model, work)
    keys = shape.layers * work.tokens
    linears = adapters = 0
    for linear in shape.linears:
        positions = keys if linear.name in KEYS_AND_VALUES else rows
        linears += 2 * linear.weights * positions
        if linear.name in model.targets:
            adapters += 2 * model.rank * (linear.inputs + linear.outputs) * positions
    per_pair = 4 * shape.heads * shape.head_dim
    whole = shape.layers - 1 if model.answers_only else shape.layers
    answers = work.answer_pairs if model.answers_only else 0
    pairs, computed_pairs = (
        whole * of_layer + answers for of_layer in (work.pairs, work.computed_pairs(model.attention))
    )
    head = 2 * shape.embedding_weights * work.answer_tokens
    first, second = model.item_dim * model.projector_hidden, model.projector_hidden * shape.hidden
    computed = per_pair * computed_pairs
    scores_again = 0 if model.attention == "eager" else computed // 2
    beyond = 3 * computed - 3 * per_pair * pairs + scores_again
    # Checkpointing stops before the layer's last product, whose result nothing needs.
    last = model.rank if "down_proj" in model.targets else shape.intermediate
    if model.lora == "fused" and "down_proj" in model.targets:
        last = 0  # one op with what it saves: it has run when checkpointing sees that nothing more is needed
    if model.recomputed == shape.layers:
        beyond += linears + adapters + computed - 2 * last * shape.hidden * rows
    else:
        weights = shape.layer_weights + sum(model.adapter_sizes) - last * shape.hidden
        again = 2 * weights * work.tokens + per_pair * work.computed_pairs(model.attention)
        beyond += model.recomputed * again
    counted = StepFlops(
        linears=2 * linears,
        adapters=3 * adapters,
        attention=3 * per_pair * pairs,
        head=2 * head,
        projector=(4 * first + 6 * second) * work.items,
        hardware=0,
    )
    return StepFlops(**{**vars(counted), "hardware": counted.model + beyond})
