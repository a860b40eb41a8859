"""Prompts read once: a batch padded on the left, its key-value cache, and the state from which answers go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llara_dist.data.samples import Sample
from llara_dist.evaluation.language_model import hidden_states
from llara_dist.model.hybrid import HybridLlama
from llara_dist.stream.batch import collate


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts after the forward pass; ranking and generation both go on from here.

    Fields:
        cache: transformers' key-value cache, L positions a row. Whoever appends to it crops it back or is the last.
        end: [N, h], the final hidden state at each prompt's last position, which predicts the answer's first token.
        real: bool [N, L], false at padding, which is on the left.
        lengths: int64 [N], positions of each prompt.
    """

    cache: Any
    end: Tensor
    real: Tensor
    lengths: Tensor


def left_padded(packed: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack a packed row into one row a sample, filled with zeros on the left.

    Padding on the left puts every prompt's end, which predicts, into the last column; padding on the right changes
    most answers, since generated tokens then follow padding.

    Args:
        packed: [T, h].
        cu_seqlens: int32 [N + 1].

    Returns:
        [N, L, h] and the mask of real positions, bool [N, L].
    """
    boundaries = cu_seqlens.to(torch.int64)
    ends = boundaries[1:, None]
    longest = int(boundaries.diff().max())
    source = ends - longest + torch.arange(longest, device=packed.device)
    real = source >= boundaries[:-1, None]
    return packed[source.clamp(min=0)] * real.unsqueeze(-1), real


@torch.no_grad()
def read_prompts(model: HybridLlama, samples: Sequence[Sample], hybrid: bool) -> Prompts:
    """Run the model over the samples' prompts, each cut where its answer begins.

    Args:
        model: in evaluation mode; its device is used.
        samples: one batch; prompts of similar length waste the least.
        hybrid: whether behaviour embeddings follow the titles, or the prompt is text alone.
    """
    batch = collate(list(samples), np.full(len(samples), hybrid), answers=False).to(model.item_table.device)
    embeddings, real = left_padded(model.embed(batch)[0], batch.cu_seqlens)
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    hidden, cache = hidden_states(model, embeddings, attention_mask=real, position_ids=positions, use_cache=True)
    return Prompts(cache=cache, end=hidden[:, -1], real=real, lengths=real.sum(dim=1))
