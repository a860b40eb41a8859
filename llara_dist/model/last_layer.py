"""A last decoder layer that computes only what answers need of it.

Nothing reads the last layer's result but the head, and the head runs at the positions that predict answers. Keys and
values are needed of every position; queries, the output projection and the MLP of those rows alone (`AnswerRows`).
Exact: what is left out has no effect on the loss, and its gradient is zero.

The layer of a loaded model becomes one of a subclass: parameters, their names, hooks and checkpointing stay as they
are, and a call without `answer_rows` (generation) is transformers' own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, rotate_half

from llara_dist.model.attention import NAME as PACKED
from llara_dist.model.packing import AnswerRows


class AnswerLayer(LlamaDecoderLayer):
    """A decoder layer that returns the answers' rows."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        answer_rows: AnswerRows | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The layer.

        Args:
            hidden_states: [1, T, h].
            answer_rows: which rows to return; None = every one, as transformers does it.
            position_embeddings: cosines and sines, [1, T, D] each.
            kwargs: of transformers.

        Returns:
            [1, R, h].
        """
        if answer_rows is None:
            return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)
        assert position_embeddings is not None
        normalised = self.input_layernorm(hidden_states)
        attended = self._attend(normalised, position_embeddings[0], position_embeddings[1], answer_rows)
        rows = hidden_states.index_select(1, answer_rows.positions) + attended
        return rows + self.mlp(self.post_attention_layernorm(rows))

    def _attend(self, hidden_states: Tensor, cosines: Tensor, sines: Tensor, answer_rows: AnswerRows) -> Tensor:
        """The attention layer's work for the rows; its linear maps are called as the modules that they are."""
        layer, positions = self.self_attn, answer_rows.positions

        def heads(states: Tensor) -> Tensor:  # [1, T, H·D] → [1, H, T, D]
            return states.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)

        query = heads(layer.q_proj(hidden_states.index_select(1, positions)))
        query = _rotated(query, cosines.index_select(1, positions), sines.index_select(1, positions))
        key, value = _rotated(heads(layer.k_proj(hidden_states)), cosines, sines), heads(layer.v_proj(hidden_states))
        attention: Any = AttentionInterface()[PACKED]
        attended, _ = attention(layer, query, key, value, None, scaling=layer.scaling, packing=answer_rows.packing)
        return layer.o_proj(attended.flatten(2))


def _rotated(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding of [1, H, T, D] with tables [1, T, D]."""
    return states * cosines[:, None] + rotate_half(states) * sines[:, None]


def compute_answers_only(model: LlamaForCausalLM) -> None:
    """Make the last layer of a loaded model one that can leave out rows."""
    last: Any = model.model.layers[-1]
    assert type(last) is LlamaDecoderLayer
    last.__class__ = AnswerLayer
