"""What a rank's steps cost it lately, told from the phases that it goes through anyway."""

from __future__ import annotations

from dataclasses import dataclass

from llara_dist.supervision.progress import Phase

_LEAST_WEIGHT = 0.1
_PARTS = {
    Phase.DATA: "wait_s",
    Phase.FORWARD: "compute_s",
    Phase.BACKWARD: "compute_s",
    Phase.REDUCE: "exchange_s",
    Phase.STEP: "exchange_s",
}


@dataclass(frozen=True)
class StepCost:
    """Of one optimizer step on one rank; means in which the newest ten steps weigh most.

    Attributes:
        steps: that it is made of.
        wait_s: seconds waiting for data.
        compute_s: seconds in forward and backward, with the collectives inside them: a rank that computes little waits
            there for the others under ZeRO-3.
        exchange_s: seconds from there to the step's end: agreement, reduction, update; the first ones wait here for the
            last one.
        samples: that the rank works on.
    """

    steps: int
    wait_s: float
    compute_s: float
    exchange_s: float
    samples: float

    @property
    def whole_s(self) -> float:
        """Seconds a step."""
        return self.wait_s + self.compute_s + self.exchange_s

    @property
    def samples_per_s(self) -> float:
        """Samples a second of the rank, data and exchange included."""
        return self.samples / self.whole_s if self.whole_s > 0 else 0.0


class StepClock:
    """Adds up a step's phases; a step ends when the phase `step` is left after its last micro-batch.

    Attributes:
        cost: None until a first step has ended.
    """

    def __init__(self) -> None:
        self.cost: StepCost | None = None
        self._phase, self._since = Phase.STARTING, 0.0
        self._begin()

    def _begin(self) -> None:
        self._sums = {"wait_s": 0.0, "compute_s": 0.0, "exchange_s": 0.0, "samples": 0.0}

    def enter(self, phase: Phase, now: float, samples: int) -> None:
        """A phase begins.

        Args:
            phase: which.
            now: seconds of a monotonic clock.
            samples: of the micro-batch that the phase works on.
        """
        part = _PARTS.get(self._phase)
        if part is not None:
            self._sums[part] += now - self._since
        if phase is Phase.FORWARD:
            self._sums["samples"] += samples
        elif self._phase is Phase.STEP:
            self._end()
        self._phase, self._since = phase, now

    def _end(self) -> None:
        old, new = self.cost, self._sums
        steps = 1 if old is None else old.steps + 1
        weight = max(_LEAST_WEIGHT, 1 / steps)
        before = {name: new[name] if old is None else getattr(old, name) for name in new}
        self.cost = StepCost(steps, **{name: before[name] + weight * (new[name] - before[name]) for name in new})
        self._begin()
