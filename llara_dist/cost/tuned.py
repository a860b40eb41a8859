"""What is tuned and how it is held: a Llama's dimensions with adapters, projector, number formats and recomputation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from llara_dist.config import RunConfig
from llara_dist.cost.architecture import Architecture
from llara_dist.model.recomputation import recomputed_layers


@dataclass(frozen=True)
class TunedModel:
    """A HybridLlama by its sizes.

    Attributes:
        architecture: of the frozen language model.
        item_dim: d, width of the item table.
        items: rows of the item table.
        rank: of the adapters.
        targets: names of the linear maps that get an adapter.
        dropout: on the adapters' input.
        projector_hidden: width between the projector's layers.
        bits: 4 = NF4 with double quantisation, 16 = bfloat16, 32 = float32.
        bfloat16: whether matrix products run in bfloat16, else float32.
        attention: packed, sdpa or eager, as in `model.attention`.
        recompute: layers whose activations are recomputed in the backward pass: true = all, or how many.
        last_layer: answers or all, as in `kernels.last_layer`; rows that are not packed compute all.
        lora: fused or peft, as `kernels.lora` comes to.
        layers: liger or torch, as `kernels.layers` comes to.
    """

    architecture: Architecture
    item_dim: int = 64
    items: int = 1682
    rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    dropout: float = 0.1
    projector_hidden: int = 4096
    bits: Literal[4, 16, 32] = 4
    bfloat16: bool = True
    attention: Literal["packed", "sdpa", "eager"] = "packed"
    recompute: bool | int = False
    last_layer: Literal["answers", "all"] = "answers"
    lora: Literal["fused", "peft"] = "fused"
    layers: Literal["liger", "torch"] = "torch"

    @classmethod
    def of(
        cls,
        config: RunConfig,
        architecture: Architecture,
        item_table: tuple[int, int],
        bfloat16: bool,
        zero_stage: int = 0,
    ) -> TunedModel:
        """What a run tunes. Of kernels that are left to `auto`: fused adapters, and transformers' own layers.

        Which layers another machine will choose is not known here, and transformers' own need more memory than Liger's.

        Args:
            config: the run.
            architecture: of its language model.
            item_table: (items, d).
            bfloat16: what `model.compute_dtype` comes to on the device.
            zero_stage: under stage 3 PEFT computes the adapters.
        """
        return cls(
            architecture=architecture,
            item_dim=item_table[1],
            items=item_table[0],
            rank=config.lora.rank,
            targets=config.lora.targets,
            dropout=config.lora.dropout,
            projector_hidden=config.projector.hidden_dim or architecture.hidden,
            bits=config.model.bits,
            bfloat16=bfloat16,
            attention=config.model.attention,
            recompute=recomputed_layers(config.model.activation_checkpointing, architecture.layers),
            last_layer=config.kernels.last_layer,
            lora="peft" if config.kernels.lora == "peft" or zero_stage == 3 else "fused",
            layers="liger" if config.kernels.layers == "liger" else "torch",
        )

    @property
    def answers_only(self) -> bool:
        """Whether the last layer computes only what answers need."""
        return self.attention == "packed" and self.last_layer == "answers"

    @property
    def recomputed(self) -> int:
        """Layers that are recomputed, the first ones."""
        return recomputed_layers(self.recompute, self.architecture.layers)

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element in matrix products."""
        return 2 if self.bfloat16 else 4

    @property
    def stream_bytes(self) -> int:
        """Bytes of an element of the residual stream: float32 weights keep it in float32."""
        return 4 if self.bits == 32 else self.compute_bytes

    @cached_property
    def adapter_sizes(self) -> list[int]:
        """Elements of each LoRA matrix of one layer."""
        return [math.prod(shape) for shape in self.architecture.adapter_shapes(self.rank, self.targets)]

    @property
    def adapter_weights(self) -> int:
        """Elements of all LoRA matrices."""
        return self.architecture.layers * sum(self.adapter_sizes)

    @property
    def projector_sizes(self) -> list[int]:
        """Elements of the projector's weight, bias, weight, bias."""
        middle, hidden = self.projector_hidden, self.architecture.hidden
        return [self.item_dim * middle, middle, middle * hidden, hidden]

    @property
    def projector_weights(self) -> int:
        """Elements of the projector."""
        return sum(self.projector_sizes)

    @property
    def trainable(self) -> int:
        """Elements that are trained, in float32."""
        return self.adapter_weights + self.projector_weights
