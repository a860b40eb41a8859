"""Attention over a packed row: each sample attends to itself only, without padding and without a T × T mask.

Registered with transformers as `packed`; `attention_backends.py` holds what computes it. Calls without a packing
(generation with a cache) go to transformers' own `sdpa`, masks included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llara_dist.model.attention_backends import attend
from llara_dist.model.packing import Packing

NAME = "packed"


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
        query: [1, H, Tq, D].
        key: [1, H_kv, T, D].
        value: [1, H_kv, T, D], in the dtype of matrix products.
        attention_mask: ignored with a packing.
        scaling: of the scores; None = 1/√D.
        dropout: on the attention weights; ignored with a packing (a Llama's is 0).
        packing: where the row's samples lie; None = not packed, transformers' `sdpa`.
        kwargs: passed on to `sdpa`.

    Returns:
        [1, Tq, H, D] in `value`'s dtype, and None.
    """
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    # Projections lie in memory as [T, H, D], so that these views are what the kernels want without a copy. After the
    # rotary embedding queries and keys are float32 where the residual stream is; the kernels take one dtype.
    rows = [states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value)]
    return attend(rows[0], rows[1], rows[2], packing, scaling)[None], None


def register() -> None:
    """Make `packed` known to transformers; its masks, where it needs any, are those of `sdpa`.

    torch.compile leaves it out of its graphs: it branches on every sample's length, and its kernels are one op each.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
    AttentionMaskInterface.register(NAME, sdpa_mask)
