"""Likelihood ranking: how likely the model finds each candidate's title as the answer.

The prompt was read once. Its candidates' answers follow it in one sequence, each with the positions it would have
directly after the prompt, and the attention mask lets an answer see the prompt and itself alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llara_dist.evaluation.language_model import hidden_states, token_embeddings, vocabulary_logits
from llara_dist.evaluation.lockstep import ALONE, Lockstep
from llara_dist.evaluation.prompts import Prompts
from llara_dist.model.hybrid import HybridLlama

_POSITIONS_PER_HEAD_CALL = 1024


@dataclass(frozen=True)
class Likelihoods:
    """Log-likelihoods of the candidates as answers.

    Fields:
        total: float64 [N, C], log-probability of the answer's tokens, EOS included, in nats.
        tokens: int64 [N, C], how many tokens that is.
    """

    total: np.ndarray
    tokens: np.ndarray

    @property
    def per_token(self) -> np.ndarray:
        """Length-normalised log-likelihood, float64 [N, C]."""
        return self.total / self.tokens


@torch.no_grad()
def score_candidates(
    model: HybridLlama,
    prompts: Prompts,
    candidates: np.ndarray,
    answers: Sequence[np.ndarray],
    lockstep: Lockstep = ALONE,
) -> Likelihoods:
    """Score every candidate of every prompt; the prompts' cache is left as it was.

    Args:
        model: in evaluation mode.
        prompts: as `read_prompts` made them.
        candidates: int [N, C], item ids in shown order.
        answers: by item id, the answer's token ids, EOS last.
        lockstep: which ranks must call the head equally often.

    Returns:
        Likelihoods in the given order.
    """
    device = prompts.end.device
    layouts = [_Layout.of([answers[int(item)] for item in row]) for row in candidates]
    # At least one position, though answers may be EOS alone: every rank then runs the layers as often.
    longest = max(1, *(len(layout.inputs) for layout in layouts))
    inputs, segments, positions = (torch.zeros((len(layouts), longest), dtype=torch.int64) for _ in range(3))
    for row, layout in enumerate(layouts):
        inputs[row, : len(layout.inputs)] = torch.from_numpy(layout.inputs)
        segments[row, : len(layout.inputs)] = torch.from_numpy(layout.segments)
        positions[row, : len(layout.inputs)] = torch.from_numpy(layout.positions)
    hidden, _ = hidden_states(
        model,
        token_embeddings(model, inputs.to(device)),
        attention_mask=_mask(prompts.real, segments.to(device), model.dtype),
        position_ids=prompts.lengths[:, None] + positions.to(device),
        past_key_values=prompts.cache,
        use_cache=True,
    )
    prompts.cache.crop(-longest)  # negative: how many positions to take off, in every supported transformers
    states = torch.cat([prompts.end[:, None], hidden.to(prompts.end.dtype)], dim=1)
    rows = np.repeat(np.arange(len(layouts)), [len(layout.predicted) for layout in layouts])
    columns = np.concatenate([layout.columns for layout in layouts])
    owners = np.concatenate([layout.owners for layout in layouts])
    predicted = np.concatenate([layout.predicted for layout in layouts])
    log_probabilities = _log_probabilities(model, states, rows, columns, predicted, lockstep)
    total, tokens = np.zeros(candidates.shape), np.zeros(candidates.shape, dtype=np.int64)
    np.add.at(total, (rows, owners), log_probabilities)
    np.add.at(tokens, (rows, owners), 1)
    return Likelihoods(total, tokens)


@dataclass(frozen=True)
class _Layout:
    """What follows one prompt: each answer without its last token, one after the other."""

    inputs: np.ndarray
    """int64 [S], token ids"""
    segments: np.ndarray
    """int64 [S], which answer a token is of, from 1"""
    positions: np.ndarray
    """int64 [S], counted from the prompt's end"""
    columns: np.ndarray
    """int64 [answer tokens], which state predicts the token: 0 = the prompt's end, s + 1 = the s-th input's"""
    predicted: np.ndarray
    """int64 [answer tokens], the token"""
    owners: np.ndarray
    """int64 [answer tokens], which answer it is of, from 0"""

    @classmethod
    def of(cls, answers: list[np.ndarray]) -> _Layout:
        lengths = np.array([len(answer) - 1 for answer in answers])
        first = np.cumsum(lengths) - lengths
        spans = [np.arange(n) for n in lengths]
        columns = [np.concatenate([[0], start + 1 + span]) for start, span in zip(first, spans, strict=True)]
        return cls(
            inputs=np.concatenate([answer[:-1] for answer in answers]).astype(np.int64),
            segments=np.repeat(np.arange(len(answers)) + 1, lengths),
            positions=np.concatenate(spans),
            columns=np.concatenate(columns),
            predicted=np.concatenate(answers).astype(np.int64),
            owners=np.repeat(np.arange(len(answers)), lengths + 1),
        )


def _mask(real: Tensor, segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [N, 1, S, L + S]: an answer's token sees the whole prompt and its own answer so far."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    own = causal & (segments[:, :, None] == segments[:, None, :])
    allowed = torch.cat([real[:, None, :].expand(-1, length, -1), own], dim=2)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def _log_probabilities(
    model: HybridLlama, states: Tensor, rows: np.ndarray, columns: np.ndarray, predicted: np.ndarray, lockstep: Lockstep
) -> np.ndarray:
    """Log-probability of each predicted token given the state at (row, column), float64; the head runs in parts."""
    device = states.device
    picked = states[torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)]
    targets = torch.from_numpy(predicted).to(device)
    parts = picked.split(_POSITIONS_PER_HEAD_CALL)
    idle = lockstep.most(len(parts)) - len(parts)  # agreed on before the first call, which gathers the head
    log_probabilities = [
        -torch.nn.functional.cross_entropy(vocabulary_logits(model, part), target, reduction="none")
        for part, target in zip(parts, targets.split(_POSITIONS_PER_HEAD_CALL), strict=True)
    ]
    for _ in range(idle):
        vocabulary_logits(model, picked[:1])
    return torch.cat(log_probabilities).double().cpu().numpy()
