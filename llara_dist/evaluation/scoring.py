"""Likelihood ranking: how likely the model finds each candidate's title as the answer.

A row's prompt is computed once. Its candidates' answers follow it in the same sequence, each with the positions it
would have directly after the prompt, and the attention mask lets an answer see the prompt and itself alone.
"""

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
    model: HybridLlama, samples: Sequence[Sample], hybrid: bool, answers: Sequence[np.ndarray]
) -> Likelihoods:
    """Score every candidate of every sample.

    Args:
        model: in evaluation mode; its device is used.
        samples: one batch, all with the same number of candidates.
        hybrid: whether behaviour embeddings follow the titles, or the prompt is text alone.
        answers: by item id, the answer's token ids, EOS last.

    Returns:
        Likelihoods in the samples' and their candidates' shown order.
    """
    device = model.item_table.device
    batch = collate(list(samples), np.full(len(samples), hybrid), answers=False).to(device)
    prompts = model.embed(batch)[0]
    starts = batch.cu_seqlens.tolist()
    layouts = [
        _Layout.of(stop - start, [answers[int(item)] for item in sample.candidates])
        for sample, start, stop in zip(samples, starts[:-1], starts[1:], strict=True)
    ]
    longest = max(len(layout.segments) for layout in layouts)
    embeddings = prompts.new_zeros(len(samples), longest, prompts.shape[1])
    segments = torch.full((len(samples), longest), -1, device=device)
    positions = torch.zeros((len(samples), longest), dtype=torch.int64, device=device)
    for row, layout in enumerate(layouts):
        length = len(layout.segments)
        answer_inputs = token_embeddings(model, torch.from_numpy(layout.inputs).to(device))
        embeddings[row, :length] = torch.cat([prompts[starts[row] : starts[row + 1]], answer_inputs])
        segments[row, :length] = torch.from_numpy(layout.segments).to(device)
        positions[row, :length] = torch.from_numpy(layout.positions).to(device)
    hidden, _ = hidden_states(
        model,
        embeddings,
        attention_mask=_mask(segments, model.dtype if model.dtype != torch.float32 else embeddings.dtype),
        position_ids=positions,
        use_cache=False,
    )
    rows = np.repeat(np.arange(len(samples)), [len(layout.predicted) for layout in layouts])
    columns = np.concatenate([layout.columns for layout in layouts])
    predicted = np.concatenate([layout.predicted for layout in layouts])
    owners = np.concatenate([layout.owners for layout in layouts])
    log_probabilities = _log_probabilities(model, hidden, rows, columns, predicted)
    shape = (len(samples), len(samples[0].candidates))
    total, tokens = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    np.add.at(total, (rows, owners), log_probabilities)
    np.add.at(tokens, (rows, owners), 1)
    return Likelihoods(total, tokens)


@dataclass(frozen=True)
class _Layout:
    """One row: the prompt (segment 0), then each answer without its last token (segments 1 … C)."""

    inputs: np.ndarray
    """int64, token ids after the prompt"""
    segments: np.ndarray
    positions: np.ndarray
    """int64 [prompt + inputs] each"""
    columns: np.ndarray
    predicted: np.ndarray
    owners: np.ndarray
    """int64, one entry an answer token: the column whose state predicts it, its id, and which candidate it is of"""

    @classmethod
    def of(cls, prompt: int, answers: list[np.ndarray]) -> _Layout:
        inputs = [answer[:-1].astype(np.int64) for answer in answers]
        lengths = np.array([len(part) for part in inputs])
        first = prompt + np.cumsum(lengths) - lengths
        columns = [
            np.concatenate([[prompt - 1], start + np.arange(n)]) for start, n in zip(first, lengths, strict=True)
        ]
        return cls(
            inputs=np.concatenate(inputs),
            segments=np.concatenate(
                [np.zeros(prompt, dtype=np.int64), np.repeat(np.arange(len(answers)) + 1, lengths)]
            ),
            positions=np.concatenate([np.arange(prompt), *[prompt + np.arange(n) for n in lengths]]),
            columns=np.concatenate(columns),
            predicted=np.concatenate([answer.astype(np.int64) for answer in answers]),
            owners=np.repeat(np.arange(len(answers)), lengths + 1),
        )


def _mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [N, 1, L, L]: causal, every position sees the prompt and its own segment."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    keys, queries = segments[:, None, :], segments[:, :, None]
    allowed = causal & ((keys == 0) | (keys == queries))
    return torch.zeros(allowed.shape, dtype=dtype, device=segments.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )[:, None]


def _log_probabilities(
    model: HybridLlama, hidden: Tensor, rows: np.ndarray, columns: np.ndarray, predicted: np.ndarray
) -> np.ndarray:
    """Log-probability of each predicted token given the state at (row, column), float64; the head runs in parts."""
    states = hidden[torch.from_numpy(rows).to(hidden.device), torch.from_numpy(columns).to(hidden.device)]
    targets = torch.from_numpy(predicted).to(hidden.device)
    parts = [
        -torch.nn.functional.cross_entropy(vocabulary_logits(model, part), target, reduction="none")
        for part, target in zip(
            states.split(_POSITIONS_PER_HEAD_CALL), targets.split(_POSITIONS_PER_HEAD_CALL), strict=True
        )
    ]
    return torch.cat(parts).double().cpu().numpy()
