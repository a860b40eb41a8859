"""How much there is to compute: the sizes of micro-batches that arithmetic and activations depend on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from llara_dist.stream.batch import Batch


@dataclass(frozen=True)
class Work:
    """Sizes of one packed row, or their sums over several.

    Attributes:
        tokens: T, positions.
        pairs: Σ L(L + 1)/2 over the samples' lengths L: (query, key) pairs of causal attention.
        row_pairs: T², what attention without packing computes.
        answer_tokens: labels; the head runs at these positions only.
        answer_rows: R, rows that a last layer computes for them: one a sample more than labels.
        answer_pairs: Σ r·L over the samples' rows r: pairs of those rows' attention, the few masked ones included.
        slots: positions that behaviour embeddings are written to.
        items: distinct items, rows that the projector maps.
    """

    tokens: int
    pairs: int
    row_pairs: int
    answer_tokens: int
    answer_rows: int
    answer_pairs: int
    slots: int
    items: int

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> Work:
        """Sizes of micro-batches, wherever their tensors are."""
        total = cls(0, 0, 0, 0, 0, 0, 0, 0)
        for batch in batches:
            rows = [count + 1 for count in batch.answer_lengths]
            total += cls(
                tokens=batch.num_tokens,
                pairs=sum(length * (length + 1) // 2 for length in batch.lengths),
                row_pairs=batch.num_tokens**2,
                answer_tokens=batch.answer_tokens,
                answer_rows=sum(rows),
                answer_pairs=sum(asked * length for asked, length in zip(rows, batch.lengths, strict=True)),
                slots=int(batch.slot_positions.shape[0]),
                items=int(batch.unique_items.shape[0]),
            )
        return total

    def __add__(self, other: Work) -> Work:
        mine, theirs = vars(self), vars(other)
        return Work(**{name: mine[name] + theirs[name] for name in mine})

    def computed_pairs(self, attention: Literal["packed", "sdpa", "eager"]) -> int:
        """(Query, key) pairs that an implementation of attention computes, masked ones included."""
        return self.pairs if attention == "packed" else self.row_pairs


@dataclass(frozen=True)
class SampleSizes:
    """Lengths of a data set's samples, in the hybrid form; the defaults are MovieLens' with Llama-2's tokenizer.

    Attributes:
        mean: tokens of a mean sample.
        longest: tokens of the longest.
        answer_tokens: labels of a mean sample, EOS included.
        slots: behaviour tokens of a mean sample.
    """

    mean: int = 230
    longest: int = 330
    answer_tokens: int = 8
    slots: int = 30

    @classmethod
    def of(cls, info: dict[str, Any], longest: int) -> SampleSizes:
        """Of training samples that are at hand; answers' length and number of slots stay the defaults.

        Args:
            info: of the shards folder, `Samples.info`. A mixture states no number of tokens: there every sample counts
                as the longest.
            longest: `Samples.longest`.
        """
        train = info.get("splits", {}).get("train", {})
        known = "tokens" in train and train.get("samples", 0) > 0
        return cls(mean=math.ceil(train["tokens"] / train["samples"]) if known else longest, longest=longest)

    def largest_row(self, budget: int, share: int, items: int) -> Work:
        """The largest micro-batch of a rank: what the budget holds, or the rank's whole share, each as the longest.

        Args:
            budget: `data.max_tokens_per_microbatch`.
            share: samples that a rank gets of a step, ⌈global batch ÷ ranks⌉.
            items: rows of the item table.
        """
        return self.row(min(budget, share * self.longest), items, share)

    def row(self, tokens: int, items: int, most: int | None = None) -> Work:
        """A packed row of so many tokens, of samples of the mean length.

        Args:
            tokens: T, e.g. `data.max_tokens_per_microbatch`.
            items: rows of the item table; a row cannot name more.
            most: samples that there are; None = as many as the tokens make.
        """
        samples = max(1, tokens // self.mean)
        samples = samples if most is None else min(samples, most)
        return Work(
            tokens=tokens,
            pairs=samples * self.mean * (self.mean + 1) // 2,
            row_pairs=tokens**2,
            answer_tokens=samples * self.answer_tokens,
            answer_rows=samples * (self.answer_tokens + 1),
            answer_pairs=samples * (self.answer_tokens + 1) * self.mean,
            slots=samples * self.slots,
            items=max(1, math.ceil(distinct(samples * self.slots, items))),
        )


def distinct(draws: int, of: int) -> float:
    """Expected number of distinct ones in uniform draws with replacement."""
    return of * (1.0 - (1.0 - 1.0 / of) ** draws)
