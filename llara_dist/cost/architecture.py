"""A Llama's dimensions and exact parameter counts, without any weight."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from llara_dist.errors import InputError

if TYPE_CHECKING:
    from transformers import LlamaConfig


@dataclass(frozen=True)
class Linear:
    """One linear map of a decoder layer.

    Attributes:
        name: as in the layer, e.g. `q_proj`; what `lora.targets` names.
        inputs: features in.
        outputs: features out.
        bias: whether it has one.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Elements of the matrix."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Architecture:
    """The dimensions of a Llama.

    Attributes:
        hidden: width of the residual stream.
        intermediate: width inside the MLP.
        layers: decoder layers.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        vocabulary: rows of the embedding and of the head.
        tied: whether the head is the embedding.
        attention_bias: whether q, k, v and o have biases.
        mlp_bias: whether gate, up and down have biases.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def of(cls, config: LlamaConfig) -> Architecture:
        """The dimensions that a transformers configuration states."""
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=config.num_key_value_heads or heads,
            head_dim=config.head_dim or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            attention_bias=bool(config.attention_bias),
            mlp_bias=bool(config.mlp_bias),
        )

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The seven linear maps of one decoder layer, in order."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            Linear("q_proj", self.hidden, queries, self.attention_bias),
            Linear("k_proj", self.hidden, keys, self.attention_bias),
            Linear("v_proj", self.hidden, keys, self.attention_bias),
            Linear("o_proj", queries, self.hidden, self.attention_bias),
            Linear("gate_proj", self.hidden, self.intermediate, self.mlp_bias),
            Linear("up_proj", self.hidden, self.intermediate, self.mlp_bias),
            Linear("down_proj", self.intermediate, self.hidden, self.mlp_bias),
        )

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's linear maps, biases not counted: what NF4 packs."""
        return sum(linear.weights for linear in self.linears)

    @property
    def linear_weights(self) -> int:
        """Elements of all layers' linear maps."""
        return self.layers * self.layer_weights

    @property
    def embedding_weights(self) -> int:
        """Elements of the token embedding."""
        return self.vocabulary * self.hidden

    @property
    def head_weights(self) -> int:
        """Elements that the head holds of its own: none where it is tied to the embedding."""
        return 0 if self.tied else self.embedding_weights

    @property
    def norm_weights(self) -> int:
        """Elements of all RMS norms: two a layer and the last."""
        return (2 * self.layers + 1) * self.hidden

    @property
    def biases(self) -> int:
        """Elements of all biases."""
        return self.layers * sum(linear.outputs for linear in self.linears if linear.bias)

    @property
    def parameters(self) -> int:
        """All elements, what the model's name counts."""
        return self.linear_weights + self.embedding_weights + self.head_weights + self.norm_weights + self.biases

    def adapter_shapes(self, rank: int, targets: tuple[str, ...]) -> list[tuple[int, int]]:
        """Shapes of the LoRA matrices of one layer, A [r, in] and B [out, r] of each target in turn.

        Raises:
            InputError: a target is none of the layers' linear maps.
        """
        known = {linear.name: linear for linear in self.linears}
        unknown = [target for target in targets if target not in known]
        if unknown:
            raise InputError(f"lora.targets: no cost is known for {unknown[0]!r}; known are {', '.join(known)}")
        adapted = [linear for linear in self.linears if linear.name in targets]
        return [shape for linear in adapted for shape in ((rank, linear.inputs), (linear.outputs, rank))]


PRESETS = {
    "llama-2-7b": Architecture(4096, 11008, 32, 32, 32, 128, 32000),
    "llama-2-13b": Architecture(5120, 13824, 40, 40, 40, 128, 32000),
    "llama-2-70b": Architecture(8192, 28672, 80, 64, 8, 128, 32000),
    "llama-3-8b": Architecture(4096, 14336, 32, 32, 8, 128, 128256),
    "llama-3-70b": Architecture(8192, 28672, 80, 64, 8, 128, 128256),
}
"""The published config.json of each, by the name that `llara-dist plan --model` takes."""
