"""Ranking metrics: where the target stands among scored items, HR@k and NDCG@k, fair to ties.

A scorer that gives every item the same score must not look perfect or useless because of how a sort breaks ties.
So a target that shares its score is placed uniformly at random among its equals, and every metric is the exact
expectation over that placement; without ties this is the usual HR@k and NDCG@k with one relevant item.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ranks:
    """Where each row's target stands.

    Fields:
        above: int64 [n], items scored strictly higher than the target.
        tied: int64 [n], other items with exactly the target's score.
    """

    above: np.ndarray
    tied: np.ndarray

    def __len__(self) -> int:
        return len(self.above)

    def hits(self, k: int) -> np.ndarray:
        """Chance that the target is among the first k, float64 [n]; 0 or 1 where nothing ties."""
        return np.clip((k - self.above) / (self.tied + 1), 0.0, 1.0)

    def gains(self, k: int | None = None) -> np.ndarray:
        """Expected NDCG@k of one relevant item, float64 [n]: 1 / log2(rank + 2), 0 from rank k on (None: no cut)."""
        last = int((self.above + self.tied).max(initial=0)) + 1
        discount = 1.0 / np.log2(np.arange(last) + 2.0)
        if k is not None:
            discount[k:] = 0.0
        summed = np.concatenate([[0.0], np.cumsum(discount)])
        return (summed[self.above + self.tied + 1] - summed[self.above]) / (self.tied + 1)


def rank_targets(scores: np.ndarray, targets: np.ndarray) -> Ranks:
    """Rank each row's target.

    Args:
        scores: float [n, items], higher is better.
        targets: int [n], the column of the target in each row.

    Raises:
        ValueError: a score is NaN; a rank would then mean nothing.
    """
    if np.isnan(scores).any():
        raise ValueError("a score is NaN, so there is no ranking; the scorer has diverged")
    own = scores[np.arange(len(targets)), targets][:, None]
    above = (scores > own).sum(axis=1, dtype=np.int64)
    return Ranks(above=above, tied=(scores == own).sum(axis=1, dtype=np.int64) - 1)


def ranking_scores(ranks: Ranks, hr_at: Iterable[int], ndcg_at: Iterable[int]) -> dict[str, float]:
    """Mean HR@k and NDCG@k over the rows, keys ``hr@k`` and ``ndcg@k``."""
    result = {f"hr@{k}": float(ranks.hits(k).mean()) for k in hr_at}
    return result | {f"ndcg@{k}": float(ranks.gains(k).mean()) for k in ndcg_at}
