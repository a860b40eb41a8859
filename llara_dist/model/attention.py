"""Attention over a packed row: each sample attends to itself only, without a T × T mask.

Registered with transformers as `packed`. Samples of one row are gathered into a padded [N, L] block, causal
scaled-dot-product attention runs on it, and the valid positions are scattered back: work and memory are N·L² instead
of the (N·L)² that a block-diagonal mask costs. Calls without a packing (generation with a cache) go to transformers'
own `sdpa`, masks included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "packed"


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a packed row lie in the padded block.

    Attributes:
        gather: int64 [N, L] row position of each block cell (0 where the cell is padding).
        scatter: int64 [T] block cell (flat) of each row position.
    """

    gather: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> Packing:
        """Lay out a packed row, without host synchronisation.

        Args:
            cu_seqlens: int32 [N + 1] cumulative lengths.
            max_seqlen: L, the longest length.
            tokens: T, the row's length, `cu_seqlens[-1]`.
        """
        boundaries = cu_seqlens.to(torch.int64)
        starts, lengths = boundaries[:-1], boundaries.diff()
        columns = torch.arange(max_seqlen, device=cu_seqlens.device)
        valid = columns[None, :] < lengths[:, None]
        gather = torch.where(valid, starts[:, None] + columns[None, :], 0)
        positions = torch.arange(tokens, device=cu_seqlens.device)
        sample = torch.searchsorted(boundaries, positions, right=True) - 1
        return cls(gather=gather, scatter=sample * max_seqlen + positions - starts[sample])


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sample of a packed row (transformers' attention interface).

    Args:
        module: the attention layer.
        query: [1, H, T, D].
        key: [1, H_kv, T, D].
        value: [1, H_kv, T, D].
        attention_mask: ignored with a packing.
        scaling: of the scores; None = 1/√D.
        dropout: on the attention weights.
        packing: the row's layout; None = not packed, transformers' `sdpa`.
        kwargs: passed on to `sdpa`.

    Returns:
        [1, T, H, D] and None.
    """
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )

    def block(states: Tensor) -> Tensor:  # [1, H, T, D] → [N, H, L, D]
        return states[0].transpose(0, 1)[packing.gather].transpose(1, 2)

    attended = F.scaled_dot_product_attention(
        block(query),
        block(key),
        block(value),
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2).flatten(0, 1)[packing.scatter][None], None


def register() -> None:
    """Make `packed` known to transformers; its masks, where it needs any, are those of `sdpa`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
