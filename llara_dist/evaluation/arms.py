"""Systems compared on the same rows: their HR@1 row by row, their numbers, their paired differences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist.data.dataset import load_dataset
from llara_dist.data.predictions import read_predictions
from llara_dist.evaluation.evaluate import likelihood_scores
from llara_dist.recommenders.bootstrap import bootstrap_interval, paired_difference
from llara_dist.recommenders.evaluation import load_recommender, rank_rows
from llara_dist.recommenders.ranking import Ranks, rank_targets

GENERATED, RANKED = "generated", "ranked"


@dataclass(frozen=True)
class Arm:
    """One system over the test rows; all arms of a report hold the same rows in the same order.

    Fields:
        name: as shown.
        about: one sentence on what it is.
        keys: uint64 [n].
        ranks: of the target among the row's frozen candidates, by score; None where nothing is scored.
        valid: bool [n], the generated answer names a candidate (exact protocol); None where nothing is generated.
        hit: bool [n], it names the target.
        exact: the numbers are expectations, known without sampling error; they get no interval.
    """

    name: str
    about: str
    keys: np.ndarray
    ranks: Ranks | None = None
    valid: np.ndarray | None = None
    hit: np.ndarray | None = None
    exact: bool = False

    def readings(self) -> dict[str, np.ndarray]:
        """HR@1 by row, float64 [n], for each way the arm was read: generated answers, likelihood or score ranking."""
        found = {}
        if self.hit is not None:
            found[GENERATED] = self.hit.astype(np.float64)
        if self.ranks is not None:
            found[RANKED] = self.ranks.hits(1)
        return found


def random_arm(keys: np.ndarray, num_candidates: int) -> Arm:
    """What choosing one of the candidates blindly gives, in expectation: every candidate ties with the target."""
    nothing = np.zeros(len(keys), dtype=np.int64)
    about = f"chooses one of the {num_candidates} candidates blindly (its expectation, no draw)"
    return Arm("random", about, keys, ranks=Ranks(nothing, nothing + num_candidates - 1), exact=True)


def recommender_arm(name: str, about: str, data: Path, weights: Path, split: str = "test") -> Arm:
    """A recommender among the frozen candidates.

    Raises:
        InputError: data set or weights are missing, damaged or do not fit.
    """
    dataset = load_dataset(Path(data))
    recommender, _ = load_recommender(Path(weights), dataset)
    ranked = rank_rows(recommender, dataset, split)
    return Arm(name, about, ranked.keys, ranks=ranked.candidates)


def evaluated_arm(name: str, about: str, folder: Path) -> Arm:
    """A language model from the folder that `llara-dist evaluate` wrote.

    Raises:
        InputError: no predictions there.
    """
    predictions = read_predictions(Path(folder) / "predictions.parquet")
    ranks = None
    if predictions.log_likelihoods is not None:
        ranks = rank_targets(likelihood_scores(predictions)["total"], predictions.target_index)
    return Arm(name, about, predictions.keys, ranks, predictions.exact_valid, predictions.exact_hit)


def measure(arm: Arm) -> dict[str, Any]:
    """An arm's numbers: HR@1 with interval for each reading, NDCG@5, valid ratio, HR@1 over valid rows."""
    result: dict[str, Any] = {"rows": len(arm.keys)}
    for reading, values in arm.readings().items():
        interval = None if arm.exact else list(bootstrap_interval(values))
        result[reading] = {"hr@1": float(values.mean()), "interval": interval}
    if arm.ranks is not None:
        result["ndcg@5"] = float(arm.ranks.gains(5).mean())
    if arm.valid is not None and arm.hit is not None:
        result["valid_ratio"] = float(arm.valid.mean())
        result["hr@1_valid"] = float(arm.hit[arm.valid].mean()) if arm.valid.any() else None
    return result


def compare(first: Arm, second: Arm) -> list[dict[str, Any]]:
    """Paired differences in HR@1, one for each reading of `first`: against the same reading, else the one there is."""
    results = []
    others = second.readings()
    for reading, values in first.readings().items():
        against = reading if reading in others else next(iter(others))
        difference, low, high = paired_difference(values, others[against])
        results.append(
            {
                "first": first.name,
                "second": second.name,
                "reading": reading,
                "against": against,
                "rows": len(values),
                "hr@1": [float(values.mean()), float(others[against].mean())],
                "difference": difference,
                "interval": [low, high],
                "verdict": verdict(low, high),
            }
        )
    return results


def verdict(low: float, high: float) -> str:
    """What a paired interval of a difference allows to say: "ahead", "behind" or "not told apart"."""
    if low > 0:
        return "ahead"
    return "behind" if high < 0 else "not told apart"
