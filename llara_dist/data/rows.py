"""The rows of a split: columnar in memory, histories as one flat array with offsets, or a source of such chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

ROWS_PER_CHUNK = 1 << 20
"""rows handled at once where a split may be too large for memory; one Parquet row group"""


@dataclass(frozen=True)
class Rows:
    """Rows of one split, columnar: row r asks for `targets[r]` after `history(r)`."""

    keys: np.ndarray
    """uint64 [n], unique over all splits."""
    users: np.ndarray
    """int32 [n], -1 where the user is not known."""
    offsets: np.ndarray
    """int64 [n + 1] into `items`."""
    items: np.ndarray
    """int32 [sum of history lengths], oldest first."""
    targets: np.ndarray
    """int32 [n]."""

    def history(self, row: int) -> np.ndarray:
        """The row's history items, int32, oldest first."""
        return self.items[self.offsets[row] : self.offsets[row + 1]]

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> np.ndarray:
        """History lengths, int64 [n]."""
        return np.diff(self.offsets)

    def chunk(self, start: int, stop: int) -> Rows:
        """The rows from `start` up to `stop`, views of these."""
        first, last = self.offsets[start], self.offsets[stop]
        return Rows(
            keys=self.keys[start:stop],
            users=self.users[start:stop],
            offsets=self.offsets[start : stop + 1] - first,
            items=self.items[first:last],
            targets=self.targets[start:stop],
        )

    def take(self, places: np.ndarray) -> Rows:
        """The rows at the given places, in that order."""
        lengths = self.lengths[places]
        return Rows(
            keys=self.keys[places],
            users=self.users[places],
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            items=self.items[ranges(self.offsets[places], lengths)],
            targets=self.targets[places],
        )


class RowSource(Protocol):
    """Rows that need not be in memory at once; `Rows` is one, too."""

    def __len__(self) -> int: ...

    def chunk(self, start: int, stop: int) -> Rows:
        """The rows from `start` up to `stop`."""
        ...


def chunks(source: RowSource, size: int = ROWS_PER_CHUNK) -> Iterator[Rows]:
    """The rows of a source in order, so many at once."""
    for start in range(0, len(source), size):
        yield source.chunk(start, min(start + size, len(source)))


def concatenate(parts: list[Rows]) -> Rows:
    """One after the other."""
    if not parts:
        none = np.zeros(0, np.int32)
        return Rows(none.astype(np.uint64), none, np.zeros(1, np.int64), none, none)
    begins = np.cumsum([0, *(len(part.items) for part in parts)])
    return Rows(
        keys=np.concatenate([part.keys for part in parts]),
        users=np.concatenate([part.users for part in parts]),
        offsets=np.concatenate(
            [[0], *(part.offsets[1:] + begin for part, begin in zip(parts, begins[:-1], strict=True))]
        ).astype(np.int64),
        items=np.concatenate([part.items for part in parts]),
        targets=np.concatenate([part.targets for part in parts]),
    )


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate arange(start, start + length) for each pair, int64."""
    total = int(lengths.sum())
    ends = lengths.cumsum()
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)
