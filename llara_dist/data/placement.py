"""Which row lies in which shard: a pure function of (seed, pass, key), and the way from rows to shards in waves.

A pass is a global shuffle, so that one user's windows do not lie together. The shuffle is made of keys alone; the rows
themselves may be larger than memory, so they go by once a wave, and a wave is as many shards as memory can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from llara_dist.data.rows import Rows, concatenate
from llara_dist.hashing import hash64, text_seed

_PLACE = text_seed("llara_dist/shards/place")
_KEYS_PER_CHUNK = 1 << 20
_ROWS_PER_WAVE = 1 << 23
"""rows in memory at once, some 70 bytes each, twice while they are sorted"""


@dataclass(frozen=True)
class Split:
    """The rows of a split, read from the start whenever they are asked for; keys run from `first_key`."""

    chunks: Callable[[], Iterator[Rows]]
    first_key: int
    num_rows: int

    def num_shards(self, samples_per_shard: int) -> int:
        """Shards of one pass."""
        return -(-self.num_rows // samples_per_shard)


@dataclass(frozen=True)
class ShardRows:
    """One shard's rows in their order."""

    number: int
    pass_index: int
    rows: Rows


def place_rows(keys: np.ndarray, seed: int, pass_index: int) -> np.ndarray:
    """The order of a pass's rows over its shards, int64 [n]: a shuffle by hash(seed, pass, key)."""
    hashes = np.empty(len(keys), dtype=np.uint64)
    for start in range(0, len(keys), _KEYS_PER_CHUNK):
        part = slice(start, start + _KEYS_PER_CHUNK)
        hashes[part] = hash64(_PLACE, seed, pass_index, keys[part])
    return np.argsort(hashes)  # the hash is a bijection of the key: no two are equal, any sort gives this order


def first_placed(split: Split, count: int, seed: int) -> Rows:
    """The rows that lie first in pass 0, in their order: a sample of the split that its keys alone decide."""
    found = concatenate([])
    for rows in split.chunks():
        found = concatenate([found, rows.take(place_rows(rows.keys, seed, 0)[:count])])
        found = found.take(place_rows(found.keys, seed, 0)[:count])
    return found


def shards_of_part(split: Split, passes: int, samples_per_shard: int, part: int, parts: int) -> list[int]:
    """The numbers of the shards that a part builds, rising: every `parts`-th one from `part`, counted from 0."""
    return list(range(part, passes * split.num_shards(samples_per_shard), parts))


def place_shards(split: Split, seed: int, samples_per_shard: int, numbers: list[int]) -> Iterator[ShardRows]:
    """The rows of the given shards, in rising order of the shards; a shard holds rows of one pass only."""
    per_pass = split.num_shards(samples_per_shard)
    shards_per_wave = max(1, _ROWS_PER_WAVE // samples_per_shard)
    for pass_index in sorted({number // per_pass for number in numbers}):
        shards = _shards_of_rows(split, seed, pass_index, samples_per_shard)
        mine = [number for number in numbers if number // per_pass == pass_index]
        for start in range(0, len(mine), shards_per_wave):
            wave = mine[start : start + shards_per_wave]
            for number, rows in zip(
                wave, _gather(split, shards, [n % per_pass for n in wave], seed, pass_index), strict=True
            ):
                yield ShardRows(number, pass_index, rows)


def _shards_of_rows(split: Split, seed: int, pass_index: int, samples_per_shard: int) -> np.ndarray:
    """The shard of each row inside its pass, int32 [rows]."""
    keys = np.arange(split.first_key, split.first_key + split.num_rows, dtype=np.uint64)
    order = place_rows(keys, seed, pass_index)
    shards = np.empty(split.num_rows, dtype=np.int32)
    for shard in range(split.num_shards(samples_per_shard)):
        shards[order[shard * samples_per_shard : (shard + 1) * samples_per_shard]] = shard
    return shards


def _gather(split: Split, shards: np.ndarray, wave: list[int], seed: int, pass_index: int) -> Iterator[Rows]:
    """The rows of each shard of a wave, while the split goes by once."""
    wanted = np.zeros(int(shards.max(initial=-1)) + 1, dtype=bool)
    wanted[wave] = True
    kept, row = [], 0
    for rows in split.chunks():
        kept.append(rows.take(np.flatnonzero(wanted[shards[row : row + len(rows)]])))
        row += len(rows)
    whole = concatenate(kept)
    kept.clear()
    found = shards[(whole.keys - np.uint64(split.first_key)).astype(np.int64)]
    by_shard = np.argsort(found, kind="stable")
    ends = np.searchsorted(found[by_shard], wave, side="right")
    begins = np.searchsorted(found[by_shard], wave, side="left")
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        places = by_shard[begin:end]
        yield whole.take(places[place_rows(whole.keys[places], seed, pass_index)])
