"""Counter-based hashing: the project's only source of pseudo-randomness that has to be the same everywhere.

Candidates, sample placement, plan order and curriculum draws must not depend on ranks, workers, restarts or a
library's generator (whose stream may change between releases). Each is a pure function of integers, built on
the splitmix64 finaliser (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
"""

from __future__ import annotations

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_TO_UNIT = 1.0 / (1 << 53)

Integers = int | np.integer | np.ndarray


def _as_u64(value: Integers) -> np.ndarray:
    if isinstance(value, int | np.integer):
        return np.asarray(int(value) & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    return value.astype(np.uint64)


def mix64(x: np.ndarray) -> np.ndarray:
    """Finalise uint64 values of any shape: a bijection in which every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        x = x + _GAMMA
        x = (x ^ (x >> np.uint64(30))) * _MIX_1
        x = (x ^ (x >> np.uint64(27))) * _MIX_2
        return x ^ (x >> np.uint64(31))


def hash64(*fields: Integers) -> np.ndarray:
    """Hash integer fields (scalars or arrays, broadcast together) to uint64.

    The order of the fields matters: ``hash64(a, b) != hash64(b, a)``.
    """
    state = np.zeros((), dtype=np.uint64)
    for field in fields:
        state = mix64(state ^ mix64(_as_u64(field)))
    return state


def uniform(*fields: Integers) -> np.ndarray:
    """Hash integer fields to float64 in [0, 1), 53 random bits each, shape of the broadcast fields."""
    return (hash64(*fields) >> np.uint64(11)).astype(np.float64) * _TO_UNIT


def permutation(n: int, *fields: Integers) -> np.ndarray:
    """A permutation of range(n), int64 [n], that depends on the scalar `fields` alone."""
    return np.argsort(hash64(*fields, np.arange(n, dtype=np.uint64)), kind="stable")


def text_seed(text: str) -> int:
    """A 64-bit seed from a name, for domain separation (``uniform(text_seed("curriculum"), seed, ...)``)."""
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
