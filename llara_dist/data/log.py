"""The in-memory form of a log: what every reader of raw data returns and the sequence maker takes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Log:
    """Events in file order and the catalogue they refer to."""

    users: np.ndarray
    """int32 [n], user ids from 0."""
    items: np.ndarray
    """int32 [n], item ids from 0."""
    timestamps: np.ndarray
    """int64 [n], in `timestamp_unit` since 1970."""
    titles: list[str]
    """By item id; unique and not empty once `llara_dist.data.titles` has been through."""
    domain: str
    """movie, game or artist: which prompt templates fit."""
    used: np.ndarray | None = None
    """bool [n]: which events make sequences; the others (low ratings, say) only exclude negatives. None = all."""
    item_ids: list[str] = field(default_factory=list)
    """By item id, the item's name in the raw data; empty when it is the id itself."""
    timestamp_unit: str = "s"
    """s, ms, us or ns."""
    user_ids: list[str] = field(default_factory=list)
    """By user id, the user's name in the raw data; empty when it is the id itself."""

    def __post_init__(self) -> None:
        lengths = {len(self.users), len(self.items), len(self.timestamps)}
        if self.used is not None:
            lengths.add(len(self.used))
        assert len(lengths) == 1, f"columns of different lengths: {sorted(lengths)}"

    def __len__(self) -> int:
        return len(self.users)

    @property
    def num_items(self) -> int:
        """Size of the catalogue, items without events included."""
        return len(self.titles)
