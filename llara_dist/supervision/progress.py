"""Where a rank is in a run: phase, step, micro-batch, sample keys; and who of two ranks is behind."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

KEYS_SHOWN = 8


class Phase(StrEnum):
    """Where a rank is, in the order of a run and of a step."""

    STARTING = "starting"
    LOADING = "loading"
    DATA = "data"
    FORWARD = "forward"
    BACKWARD = "backward"
    REDUCE = "reduce"
    STEP = "step"
    VALIDATION = "validation"
    CHECKPOINT = "checkpoint"
    FINISHED = "finished"

    @property
    def is_limited(self) -> bool:
        """Whether a rank that stays in it without progress hangs.

        Starting and loading last as long as the weights take, validation and checkpoint as long as the slowest rank;
        ranks that wait there for another one cannot tell. They have no limit of their own: a rank that died is
        noticed there as well, one that hangs once a rank elsewhere waits for it.
        """
        return self in (Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.REDUCE, Phase.STEP)


_ORDER = {
    Phase.STARTING: (0, 0),
    Phase.LOADING: (1, 0),
    Phase.DATA: (2, 0),
    Phase.FORWARD: (3, 0),
    Phase.BACKWARD: (3, 1),
    Phase.REDUCE: (3, 2),
    Phase.STEP: (3, 3),
    Phase.VALIDATION: (4, 0),
    Phase.CHECKPOINT: (5, 0),
    Phase.FINISHED: (6, 0),
}
"""Place among the parts of a step, and within a micro-batch: each one goes through all phases of part 3."""
_MICROBATCHES = 3


@dataclass(frozen=True)
class Progress:
    """Where a rank stands.

    Attributes:
        phase: what it is doing.
        step: optimizer step, 0-based; −1 before the first.
        microbatch: of this rank in the step, 0-based.
        keys: the first sample keys of the micro-batch (or of the step).
        num_keys: how many there are.
    """

    phase: Phase = Phase.STARTING
    step: int = -1
    microbatch: int = 0
    keys: tuple[int, ...] = ()
    num_keys: int = 0

    @property
    def position(self) -> tuple[int, int, int, int]:
        """Orders ranks: who is behind has the smaller one. Equal for ranks at the same place."""
        part, inside = _ORDER[self.phase]
        return self.step, part, self.microbatch if part == _MICROBATCHES else 0, inside

    @property
    def place(self) -> str:
        """For people: "step 17, micro-batch 2, backward"."""
        if self.step < 0:
            return str(self.phase)
        if _ORDER[self.phase][0] == _MICROBATCHES:
            return f"step {self.step}, micro-batch {self.microbatch}, {self.phase}"
        return f"step {self.step}, {self.phase}"

    @property
    def samples(self) -> str:
        """For people: "sample keys 5, 9, … (12 in all)"; "" where none are known."""
        if not self.keys:
            return ""
        more = f", … ({self.num_keys} in all)" if self.num_keys > len(self.keys) else ""
        return f"sample keys {', '.join(map(str, self.keys))}{more}"
