"""Free greedy generation from prompts that were read: EOS stops a row, the others go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llara_dist.evaluation.language_model import hidden_states, token_embeddings, vocabulary_logits
from llara_dist.evaluation.lockstep import ALONE, Lockstep
from llara_dist.evaluation.prompts import Prompts
from llara_dist.model.hybrid import HybridLlama

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


@torch.no_grad()
def generate(
    model: HybridLlama,
    prompts: Prompts,
    eos: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    lockstep: Lockstep = ALONE,
    beat: Callable[[], None] | None = None,
) -> list[Generation]:
    """Generate each prompt's answer greedily; the prompts' cache is used up.

    An answer does not depend on which prompts share its batch (in fp32 up to ties of logits within rounding).
    In lock-step it goes on, with one row, until the last rank's answers are done.

    Args:
        model: in evaluation mode.
        prompts: as `read_prompts` made them.
        eos: the token that ends an answer.
        max_new_tokens: the longest answer, EOS included.
        lockstep: which ranks must compute equally many tokens.
        beat: called for every token, as a sign of life.

    Returns:
        One generation a prompt, in order.
    """
    device, cache, real, positions = prompts.end.device, prompts.cache, prompts.real, prompts.lengths[:, None]
    answers: list[list[int]] = [[] for _ in real]
    finished = [False] * len(answers)
    rows = list(range(len(answers)))
    state = prompts.end
    for length in range(1, max_new_tokens + 1):
        if beat is not None:
            beat()
        chosen = vocabulary_logits(model, state).argmax(dim=-1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if token == eos:
                finished[row] = True
            elif not finished[row]:
                answers[row].append(token)
        going = [place for place, row in enumerate(rows) if not finished[row]]
        if length == max_new_tokens or not lockstep.any(bool(going)):
            break
        staying = going or [0]  # a rank that only keeps step does so with one row
        if 2 * len(staying) <= len(rows):
            # Few answers are long: going on with the finished ones would cost most of the time.
            kept = torch.tensor(staying, device=device)
            cache.batch_select_indices(kept)
            rows = [rows[place] for place in staying]
            chosen, real, positions = chosen[kept], real[kept], positions[kept]
        real = torch.cat([real, real.new_ones(len(real), 1)], dim=1)
        hidden, cache = hidden_states(
            model,
            token_embeddings(model, chosen[:, None]),
            attention_mask=real,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        state, positions = hidden[:, -1], positions + 1
    return [Generation(tokens, done) for tokens, done in zip(answers, finished, strict=True)]
