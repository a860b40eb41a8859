"""Where samples lie in a packed row: on the host as lengths, on the device as boundaries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from llara_dist.stream.batch import Batch

Backend = Literal["flash3", "flash2", "varlen", "sdpa"]


@dataclass(frozen=True)
class Segments:
    """Consecutive stretches of rows, one a sample.

    Attributes:
        lengths: rows of each, at least 1.
        boundaries: int32 [N + 1] on the device, from 0: the cumulative lengths.
    """

    lengths: tuple[int, ...]
    boundaries: Tensor

    @property
    def longest(self) -> int:
        """Rows of the longest stretch."""
        return max(self.lengths)


@dataclass(frozen=True)
class Packing:
    """Which queries attend to which keys: sample by sample, the last query of a sample standing at its last key.

    Attributes:
        queries: the rows that ask.
        keys: the rows that are asked; every sample has as many of them as of queries, or more.
        backend: what computes it.
    """

    queries: Segments
    keys: Segments
    backend: Backend

    @classmethod
    def of(cls, batch: Batch, backend: Backend) -> Packing:
        """Every position of a packed row asks."""
        samples = Segments(batch.lengths, batch.cu_seqlens)
        return cls(samples, samples, backend)

    @property
    def is_square(self) -> bool:
        """Whether every position asks."""
        return self.queries is self.keys

    @cached_property
    def mask(self) -> Tensor:
        """Bool [longest queries, longest keys]; its lower right corner is the causal mask of any sample."""
        rows, columns = self.queries.longest, self.keys.longest
        return torch.ones(rows, columns, dtype=torch.bool, device=self.keys.boundaries.device).tril(columns - rows)


@dataclass(frozen=True)
class AnswerRows:
    """The rows that answers need of the last layer: each sample's end, from where its answer is first predicted.

    A sample's last token predicts nothing; it is kept, so that queries and keys end together as every attention kernel
    wants it, and so that a row without labels still has rows.

    Attributes:
        positions: int64 [R], which positions of the packed row, ascending; R = labels + samples.
        labels: int64 [L], which of the R rows predict.
        packing: these rows ask, all positions are asked.
    """

    positions: Tensor
    labels: Tensor
    packing: Packing

    @classmethod
    def of(cls, batch: Batch, packing: Packing) -> AnswerRows:
        """Of a packed row, without host synchronisation.

        Args:
            batch: its labels are predicted by consecutive positions that end before each sample's last.
            packing: of all positions.
        """
        device = batch.tokens.device
        samples = torch.arange(len(batch.lengths), device=device)
        # Of every sample there is one row more than it has labels: its last.
        labels = torch.arange(batch.labels.shape[0], device=device) + batch.sample_of_label
        ends = torch.searchsorted(batch.sample_of_label, samples, right=True) + samples + 1
        positions = torch.empty(batch.labels.shape[0] + len(batch.lengths), dtype=torch.int64, device=device)
        positions.index_copy_(0, labels, batch.label_positions)
        positions.index_copy_(0, ends - 1, batch.cu_seqlens[1:].to(torch.int64) - 1)
        boundaries = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        queries = Segments(tuple(count + 1 for count in batch.answer_lengths), boundaries)
        return cls(positions, labels, Packing(queries, packing.keys, packing.backend))
