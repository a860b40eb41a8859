"""When a run validates, what it remembers of it, and when that ends the run early."""

from __future__ import annotations

from typing import Any

from llara_dist.config import ValidationConfig
from llara_dist.training.engine import Engine
from llara_dist.training.scores import Patience, ValidationScores, Validator


class Validations:
    """Validates a run when that is due; the same on every rank.

    What it remembers is part of the run's state, so that a resumed run validates, and stops, where one left alone does.

    Args:
        validator: computes the scores; None = the run does not validate.
        settings: when, and for how long without a better one.
        total_steps: T; the end of the run is validated as well.
        state: what `to_dict` gave, from the checkpoint that the run goes on from.
    """

    def __init__(
        self, validator: Validator | None, settings: ValidationConfig, total_steps: int, state: dict[str, Any]
    ) -> None:
        self._validator = validator
        self._every = settings.every_steps
        self._total_steps = total_steps
        self.patience = Patience(settings.patience)
        # Generated and ranked HR@1, or other rows, are two scales: a best on the one says nothing on the other.
        if validator is not None and state.get("measure") == validator.measure:
            self.patience = Patience.from_dict(settings.patience, state["patience"])
        self.measured_anew = validator is not None and state.get("measure") not in (None, validator.measure)
        self.owed_after = state.get("owed_after")

    def due(self, done: int) -> bool:
        """Whether the run is validated after `done` steps."""
        return self._validator is not None and (done % self._every == 0 or done == self._total_steps)

    def owes(self, done: int) -> bool:
        """Whether the checkpoint after `done` steps was written before the validation that was due there."""
        return self.owed_after == done and self.due(done)

    def put_off(self, done: int) -> None:
        """What is due after `done` steps is owed by the checkpoint written now: done later, or after a resume."""
        self.owed_after = done if self.due(done) else None

    def validate(self, engine: Engine, done: int) -> tuple[ValidationScores, bool] | None:
        """Validate after `done` steps; every rank calls it.

        Returns:
            The scores, and whether they are the best so far; None where it was given up because the run is to stop.
        """
        assert self._validator is not None
        scores = self._validator(engine, done)
        if scores is None:
            return None
        self.patience = self.patience.after(scores)
        self.owed_after = None
        return scores, self.patience.best is scores

    @property
    def exhausted(self) -> bool:
        """Whether the run ends here: too many validations in a row brought nothing better."""
        return self.patience.exhausted

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for a checkpoint."""
        measure = None if self._validator is None else self._validator.measure
        return {"patience": self.patience.to_dict(), "owed_after": self.owed_after, "measure": measure}
