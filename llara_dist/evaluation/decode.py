"""Free greedy generation: a batch of prompts, padded on the left, one shared key-value cache, EOS stops a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llara_dist.data.samples import Sample
from llara_dist.evaluation.language_model import hidden_states, token_embeddings, vocabulary_logits
from llara_dist.model.hybrid import HybridLlama
from llara_dist.stream.batch import collate

MAX_NEW_TOKENS = 64
"""the paper's limit"""


@dataclass(frozen=True)
class Generation:
    """One generated answer.

    Fields:
        tokens: ids without EOS.
        finished: EOS came within the limit.
    """

    tokens: list[int]
    finished: bool


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
def generate(
    model: HybridLlama, samples: Sequence[Sample], hybrid: bool, eos: int, max_new_tokens: int = MAX_NEW_TOKENS
) -> list[Generation]:
    """Generate each sample's answer greedily.

    An answer does not depend on which samples share its batch (in fp32 up to ties of logits within rounding).

    Args:
        model: in evaluation mode; its device is used.
        samples: one batch; prompts of similar length waste the least.
        hybrid: whether behaviour embeddings follow the titles, or the prompt is text alone.
        eos: the token that ends an answer.
        max_new_tokens: the longest answer, EOS included.

    Returns:
        One generation a sample, in order.
    """
    device = model.item_table.device
    batch = collate(list(samples), np.full(len(samples), hybrid), answers=False).to(device)
    prompt, real = left_padded(model.embed(batch)[0], batch.cu_seqlens)
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    answers: list[list[int]] = [[] for _ in samples]
    finished = [False] * len(samples)
    rows = list(range(len(samples)))
    inputs, cache = prompt, None
    for _ in range(max_new_tokens):
        hidden, cache = hidden_states(
            model, inputs, attention_mask=real, position_ids=positions, past_key_values=cache, use_cache=True
        )
        chosen = vocabulary_logits(model, hidden[:, -1]).argmax(dim=-1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if finished[row]:
                continue
            if token == eos:
                finished[row] = True
            else:
                answers[row].append(token)
        open_rows = [place for place, row in enumerate(rows) if not finished[row]]
        if not open_rows:
            break
        if 2 * len(open_rows) <= len(rows):
            # Few answers are long: going on with the finished ones would cost most of the time.
            kept = torch.tensor(open_rows, device=device)
            cache.batch_select_indices(kept)
            rows = [rows[place] for place in open_rows]
            chosen, real, positions = chosen[kept], real[kept], positions[kept]
        inputs = token_embeddings(model, chosen[:, None])
        positions = positions[:, -1:] + 1
        real = torch.cat([real, real.new_ones(len(real), 1)], dim=1)
    return [Generation(tokens, done) for tokens, done in zip(answers, finished, strict=True)]
