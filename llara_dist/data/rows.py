"""The rows of one split in memory: histories as one flat array with offsets, so that millions stay cheap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """One split, columnar: row r asks for `targets[r]` after `history(r)`."""

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


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate arange(start, start + length) for each pair, int64."""
    total = int(lengths.sum())
    ends = lengths.cumsum()
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)
