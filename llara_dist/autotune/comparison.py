"""Whether one setting is faster than another: pairs of timed windows, and a sign test.

Two settings are timed in turn, window by window, so that what slows the machine down slows both. The new one is kept
where the median of the windows' ratios exceeds `WORTH` and all of them but one exceed 1. That is a sign test: of two
equal settings it keeps the new one in less than a tenth of all cases, however loud the noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from llara_dist.autotune.settings import Setting

WORTH = 1.03
"""a setting must be so much faster than the best so far to replace it; a tie keeps what there was"""
ROUNDS = 7
"""pairs of windows at most; fewer where the outcome is clear"""
CLEAR = 5
"""pairs that are enough where all of them exceed `WORTH`"""


@dataclass(frozen=True)
class Comparison:
    """What pairs of windows showed.

    Attributes:
        ratios: speed of the challenger to the champion's, pair by pair.
        speed: the challenger's in its median window.
    """

    ratios: tuple[float, ...]
    speed: float

    @property
    def ratio(self) -> float:
        """Of the median pair."""
        return median(self.ratios)

    @property
    def is_worth_it(self) -> bool:
        """Whether the challenger is faster, beyond noise and by more than a tie."""
        return self.ratio > WORTH and sum(ratio <= 1.0 for ratio in self.ratios) <= 1

    @property
    def is_clear(self) -> bool:
        """Whether more pairs would not change the outcome, or hardly."""
        is_lost = sum(ratio <= 1.0 for ratio in self.ratios) > 1
        return is_lost or (len(self.ratios) >= CLEAR and min(self.ratios) > WORTH)


def compare(speed: Callable[[Setting], float], champion: Setting, challenger: Setting) -> Comparison:
    """Time two settings in turn.

    Args:
        speed: of one window of a setting, tokens per second.
        champion: what there is.
        challenger: what may replace it.
    """
    ratios: tuple[float, ...] = ()
    own: list[float] = []
    for turn in range(ROUNDS):
        order = (champion, challenger) if turn % 2 == 0 else (challenger, champion)
        seen = {setting: speed(setting) for setting in order}
        own.append(seen[challenger])
        ratios = (*ratios, seen[challenger] / seen[champion])
        if len(ratios) > 2 and Comparison(ratios, 0.0).is_clear:
            break
    return Comparison(ratios, median(own))
