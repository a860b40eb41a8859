"""Token budgets: the largest that fits, and those up to it that are worth timing."""

from __future__ import annotations

from collections.abc import Callable

GRAIN = 256
"""tokens: budgets are found to a multiple of it"""


def largest_that_fits(fits: Callable[[int], bool], low: int, high: int, guess: int) -> int:
    """The largest budget that fits, to `GRAIN` or an eighth of it: by doubling or halving, then by bisection.

    What is returned was seen to fit, and nothing at or below it was seen not to.

    Args:
        fits: tries a budget.
        low: the smallest of use.
        high: the largest of use.
        guess: where to begin.

    Returns:
        Tokens; 0 where not even `low` fits.
    """
    high = max(low, high)
    tried = min(max(guess, low), high)
    good, bad = 0, high + 1
    while True:  # until both are known, or an end is reached
        if fits(tried):
            good = tried
            if bad <= high or good == high:
                break
            tried = min(2 * tried, high)
        else:
            bad = tried
            if good or bad == low:
                break
            tried = max(tried // 2, low)
    while good and bad <= high and bad - good > max(GRAIN, good // 8):
        middle = (good + bad) // 2
        middle = middle - middle % GRAIN if middle - middle % GRAIN > good else middle
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def budgets(low: int, largest: int, own: int) -> list[int]:
    """Budgets worth timing, increasing: powers of two, the run's own and the largest."""
    powers = (2**power for power in range(low.bit_length() - 1, largest.bit_length() + 1))
    return sorted({*(power for power in powers if low <= power <= largest), min(own, largest), largest})
