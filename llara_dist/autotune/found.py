"""What a search came to: every trial, and the best of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from llara_dist.autotune.settings import Setting


@dataclass(frozen=True)
class Trial:
    """One line of what was tried.

    Attributes:
        what: "kernels.lora=fused".
        tokens: the budget it was measured with.
        tokens_per_s: of its median window; None where it was not timed.
        ratio: of its speed to the start's; None where it was not timed.
        peak_bytes: of device memory; None where that is not known.
        verdict: kept, not kept and why.
    """

    what: str
    tokens: int
    tokens_per_s: float | None
    ratio: float | None
    peak_bytes: int | None
    verdict: str


@dataclass
class Found:
    """What a search came to; filled while it runs, so that it holds the best so far at any time.

    Attributes:
        best: fits, and is the fastest that was seen.
        largest: tokens of the largest row that was seen to fit with the start's other settings; 0 = not looked for.
        ratio: speed of `best` to the start's.
        trials: in order.
        untried: for lack of time.
        settled: fields that the run is to be given: those of which another value was timed, and what `best` needs to
            fit.
    """

    best: Setting
    largest: int = 0
    ratio: float = 1.0
    trials: list[Trial] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)
    settled: set[str] = field(default_factory=set)

    @property
    def has_start(self) -> bool:
        """Whether so much as the start was measured."""
        return bool(self.trials)
