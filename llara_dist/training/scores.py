"""What a validation found, which of two findings is better, and when to stop early."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Protocol

from llara_dist.training.engine import Engine


@dataclass(frozen=True)
class ValidationScores:
    """What one validation found; the same on every rank.

    Attributes:
        step: optimizer steps done before it.
        hit_ratio: HR@1, hits ÷ rows.
        loss: summed answer cross-entropy ÷ answer tokens, in nats; NaN or infinite where the model has diverged.
        valid_ratio: generated answers that name a candidate ÷ rows; None where nothing was generated.
        rows: validated.
        seconds: of the slowest rank.
    """

    step: int
    hit_ratio: float
    loss: float
    valid_ratio: float | None = None
    rows: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field; a loss that is not finite, which JSON cannot hold, becomes None."""
        return dataclasses.asdict(self) | {"loss": self.loss if math.isfinite(self.loss) else None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ValidationScores:
        """Back from `to_dict`."""
        loss = math.nan if values["loss"] is None else values["loss"]
        return cls(**{**values, "loss": float(loss), "step": int(values["step"])})


class Validator(Protocol):
    """What the loop calls between two optimizer steps; it leaves nothing behind that the next step could see."""

    measure: dict[str, Any]
    """how HR@1 is found: scores of another measure are not compared"""

    def __call__(self, engine: Engine, step: int) -> ValidationScores | None:
        """Validate after `step` optimizer steps; every rank calls it, every rank gets the same.

        Returns:
            None where a rank was asked to stop in the middle of it.
        """
        ...


def is_better(scores: ValidationScores, best: ValidationScores | None) -> bool:
    """Whether `scores` take the place of `best`, which are earlier.

    Higher HR@1 is better. Validation splits are small (94 rows on MovieLens), so it ties often: then the lower
    validation loss is better, and a loss that is not finite is the worst. What is equal in both does not replace.
    """
    return best is None or _merit(scores) > _merit(best)


def _merit(scores: ValidationScores) -> tuple[float, float]:
    return (
        -math.inf if math.isnan(scores.hit_ratio) else scores.hit_ratio,
        -scores.loss if math.isfinite(scores.loss) else -math.inf,
    )


@dataclass(frozen=True)
class Patience:
    """Early stopping: the best validation so far, and how many in a row were not better.

    Part of a run's state: a checkpoint carries `to_dict()`, so that a resumed run stops where one left alone does.

    Attributes:
        limit: stop after so many validations in a row without a better one; 0 = never.
        best: the best validation so far.
        since_best: validations since then.
    """

    limit: int
    best: ValidationScores | None = None
    since_best: int = 0

    def after(self, scores: ValidationScores) -> Patience:
        """The state once `scores` are known."""
        if is_better(scores, self.best):
            return Patience(self.limit, scores)
        return Patience(self.limit, self.best, self.since_best + 1)

    @property
    def exhausted(self) -> bool:
        """Whether the run is to stop now."""
        return 0 < self.limit <= self.since_best

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; without the limit, which is configuration."""
        return {"best": None if self.best is None else self.best.to_dict(), "since_best": self.since_best}

    @classmethod
    def from_dict(cls, limit: int, values: dict[str, Any]) -> Patience:
        """Back from `to_dict`, under the limit of the run's configuration."""
        best = values["best"]
        return cls(limit, None if best is None else ValidationScores.from_dict(best), int(values["since_best"]))
