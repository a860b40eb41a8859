"""Histories of a dataset folder as the padded rows that recommenders read."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def padded_histories(
    offsets: np.ndarray, items: np.ndarray, max_history: int, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lay ragged histories out as rows, right-padded; the newest `max_history` items are kept.

    Args:
        offsets: int64 [n + 1] into `items`.
        items: int [total], each history oldest first.
        max_history: columns.
        padding: the id that fills the rest, the number of items.

    Returns:
        Histories int64 [n, max_history] and lengths int64 [n].
    """
    ends = offsets[1:]
    lengths = np.minimum(ends - offsets[:-1], max_history)
    columns = np.arange(max_history)
    real = columns < lengths[:, None]
    source = np.where(real, (ends - lengths)[:, None] + columns, 0)
    picked = items[source] if len(items) else np.zeros_like(source)
    return np.where(real, picked, padding).astype(np.int64), lengths.astype(np.int64)


def history_tensors(offsets: np.ndarray, items: np.ndarray, max_history: int, padding: int) -> tuple[Tensor, Tensor]:
    """`padded_histories` as tensors."""
    histories, lengths = padded_histories(offsets, items, max_history, padding)
    return torch.from_numpy(histories), torch.from_numpy(lengths)
