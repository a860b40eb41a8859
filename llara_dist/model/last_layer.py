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
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, rotate_half

from llara_dist.model.attention import packed_attention
from llara_dist.model.packing import AnswerRows


class AnswerAttention(LlamaAttention):
    """Attention whose queries are the answers' rows."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        answer_rows: AnswerRows | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's attention.

        Args:
            hidden_states: [1, T, h], normalised.
            position_embeddings: cosines and sines, [1, T, D] each.
            attention_mask: for a call without `answer_rows`.
            answer_rows: which rows ask; None = every one, as transformers does it.
            kwargs: of transformers.

        Returns:
            [1, R, h] and None.
        """
        if answer_rows is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        rows = answer_rows.positions
        cosines, sines = position_embeddings

        def heads(states: Tensor) -> Tensor:  # [1, T, H·D] → [1, H, T, D]
            return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        query = _rotated(
            heads(self.q_proj(hidden_states.index_select(1, rows))),
            cosines.index_select(1, rows),
            sines.index_select(1, rows),
        )
        key, value = _rotated(heads(self.k_proj(hidden_states)), cosines, sines), heads(self.v_proj(hidden_states))
        attended, _ = packed_attention(self, query, key, value, None, scaling=self.scaling, packing=answer_rows.packing)
        return self.o_proj(attended.flatten(2)), None


class AnswerLayer(LlamaDecoderLayer):
    """A decoder layer that returns the answers' rows."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, answer_rows: AnswerRows | None = None, **kwargs: Any
    ) -> Tensor:
        """The layer.

        Args:
            hidden_states: [1, T, h].
            answer_rows: which rows to return; None = every one, as transformers does it.
            kwargs: of transformers.

        Returns:
            [1, R, h].
        """
        if answer_rows is None:
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), answer_rows=answer_rows, **kwargs
        )
        rows = hidden_states.index_select(1, answer_rows.positions) + attended
        return rows + self.mlp(self.post_attention_layernorm(rows))


def _rotated(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding of [1, H, T, D] with tables [1, T, D]."""
    return states * cosines[:, None] + rotate_half(states) * sines[:, None]


def compute_answers_only(model: LlamaForCausalLM) -> None:
    """Make the last layer of a loaded model one that can leave out rows."""
    last: Any = model.model.layers[-1]
    assert type(last) is LlamaDecoderLayer
    last.__class__ = AnswerLayer
    last.self_attn.__class__ = AnswerAttention
