"""How far a number could move: percentile bootstrap intervals, and paired ones for two systems on the same rows."""

from __future__ import annotations

import numpy as np


def bootstrap_interval(
    values: np.ndarray, resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean.

    Rows are drawn with replacement, so the interval says how far the number could move on other users of the same
    kind.

    Args:
        values: float [n], one value a row (hit or not, a gain, a difference of two systems).
        resamples: bootstrap draws.
        seed: of the draws; the interval is a pure function of the arguments.
        confidence: the interval's coverage.

    Returns:
        Lower and upper bound.

    Raises:
        ValueError: no rows.
    """
    if len(values) == 0:
        raise ValueError("no rows, so no interval")
    generator = np.random.Generator(np.random.PCG64(seed))
    unique, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    # Hits take two or three values: drawing how often each value comes is the same resampling, only far cheaper.
    draws = generator.multinomial(len(values), counts / len(values), size=resamples) if len(unique) <= 64 else None
    if draws is not None:
        means = draws @ unique / len(values)
    else:
        means = np.array([generator.choice(values, len(values)).mean() for _ in range(resamples)])
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)


def paired_difference(
    first: np.ndarray, second: np.ndarray, resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of `first` minus mean of `second` over the same rows, and its paired bootstrap interval.

    Pairing removes what both systems share: how hard a row is. It is the interval to judge a difference by; two
    overlapping intervals of single systems say little.

    Args:
        first: float [n], one value a row.
        second: float [n], the other system's values of the same rows in the same order.
        resamples: bootstrap draws.
        seed: of the draws.
        confidence: the interval's coverage.

    Returns:
        Difference, lower bound, upper bound.

    Raises:
        ValueError: the two have different numbers of rows, or none.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} rows; a paired difference needs the same ones")
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return float(differences.mean()), *bootstrap_interval(differences, resamples, seed, confidence)
