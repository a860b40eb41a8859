"""LLaRA's own folders: `train_data.df`, `Val_data.df`, `Test_data.df` and a title list.

Each frame has `seq` (the last items, oldest first, right-padded with the padding id; on MovieLens (id, rating)
pairs), `len_seq` and `next`. The padding id is the number of items. They hold no user and nothing older than the
window, so a row's user is null and its negatives can only be kept off the window and the target.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llara_dist.data.dataset import SPLITS
from llara_dist.data.frame_pickle import read_frame
from llara_dist.data.log import Log
from llara_dist.data.movielens import read_u_item
from llara_dist.data.rows import Rows
from llara_dist.errors import InputError

FILES = {"train": "train_data.df", "val": "Val_data.df", "test": "Test_data.df"}
NOTE = (
    "The source stores no users and only the last items of each window: user is null, interactions are empty, and "
    "negatives exclude the known window and the target alone, so a user may have touched some of them."
)


def read_llara(
    raw: Path, domain: str, min_history: int, max_history: int
) -> tuple[Log, dict[str, Rows], dict[str, int]]:
    """Read one of LLaRA's folders.

    Args:
        raw: folder with the three frames and `u.item` or `id2name.txt`.
        domain: movie, game or artist.
        min_history: rows with fewer history items are dropped and counted (LLaRA: 3).
        max_history: a longer history keeps its last items.

    Returns:
        A log without events (raw titles, item ids), "train", "val", "test" → rows, and counts.

    Raises:
        InputError: a file is missing, its pickle is refused or of an unknown form, or a row is inconsistent.
    """
    titles, item_ids = _read_titles(raw)
    counts: dict[str, int] = {}
    splits: dict[str, Rows] = {}
    first_key = 0
    for split in SPLITS:
        path = raw / FILES[split]
        history, lengths, targets = _read_windows(path, len(titles))
        if split == "train":
            counts["train_windows"] = len(targets)
        kept = lengths >= min_history
        counts[f"{split}_dropped_short"] = int((~kept).sum())
        history, lengths, targets = history[kept], lengths[kept], targets[kept]
        if not len(targets):
            raise InputError(f"{path}: no row has at least min_history = {min_history} history items")
        place = np.arange(history.shape[1])
        inside = (place < lengths[:, None]) & (place >= lengths[:, None] - max_history)
        splits[split] = Rows(
            keys=np.arange(first_key, first_key + len(targets), dtype=np.uint64),
            users=np.full(len(targets), -1, dtype=np.int32),
            offsets=np.concatenate([[0], inside.sum(axis=1).cumsum()]).astype(np.int64),
            items=history[inside].astype(np.int32),
            targets=targets.astype(np.int32),
        )
        first_key += len(targets)
    none = np.zeros(0, dtype=np.int32)
    log = Log(users=none, items=none, timestamps=none.astype(np.int64), titles=titles, domain=domain, item_ids=item_ids)
    return log, splits, counts


def _read_titles(raw: Path) -> tuple[list[str], list[str]]:
    """Raw titles and what the title list calls the items, by item id."""
    if (raw / "id2name.txt").is_file():
        titles = read_id2name(raw / "id2name.txt")
        return titles, [str(item) for item in range(len(titles))]
    if (raw / "u.item").is_file():
        titles = read_u_item(raw / "u.item")
        return titles, [str(item + 1) for item in range(len(titles))]
    raise InputError(f"{raw}: has neither id2name.txt (id::title) nor u.item; the titles are needed")


def read_id2name(path: Path) -> list[str]:
    """Raw titles by item id from `id2name.txt` (`id::title`, UTF-8, ids 0, 1, … each once, in any order).

    Raises:
        InputError: a line is malformed, an id is there twice or missing, or the file is not UTF-8.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line}: not UTF-8; convert the file") from None
    titles: dict[int, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):  # a title may hold other Unicode line breaks
        if not line.strip() and number > 1:
            continue
        item, separator, title = line.rstrip("\r").partition("::")
        if not separator or not item.strip().isdecimal():
            raise InputError(f"{path}: line {number}: expected 'id::title', found {line[:60]!r}")
        if int(item) in titles:
            raise InputError(f"{path}: line {number}: item {int(item)} is listed twice")
        titles[int(item)] = title
    missing = sorted(set(range(len(titles))) - titles.keys())
    if missing:
        raise InputError(
            f"{path}: item {missing[0]} is not listed; {len(titles)} items need the ids 0..{len(titles) - 1}"
        )
    return [titles[item] for item in range(len(titles))]


def _read_windows(path: Path, num_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """History int64 [n, width] left-aligned, lengths int64 [n], targets int64 [n]."""
    if not path.is_file():
        raise InputError(f"{path}: not found; LLaRA's folders hold {', '.join(FILES.values())}")
    frame = read_frame(path)
    for column in ("seq", "len_seq", "next"):
        if column not in frame:
            raise InputError(f"{path}: column {column!r} is missing; found {', '.join(frame) or 'none'}")
    history = _ids(path, "seq", frame["seq"], width=True)
    targets = _ids(path, "next", frame["next"], width=False)
    stated = _ids(path, "len_seq", frame["len_seq"], width=False)
    padding = num_items
    wrong = np.flatnonzero(((history < 0) | (history > padding)).any(axis=1) | (targets < 0) | (targets >= padding))
    if len(wrong):
        raise InputError(
            f"{path}: row {int(wrong[0])}: an item id is not in 0..{num_items - 1}; the title list has {num_items} "
            f"items and {padding} is the padding id"
        )
    filled = history != padding
    lengths = filled.sum(axis=1)
    # The authors state a length of 1 for a user's first event, whose history is empty.
    inconsistent = (filled != (np.arange(history.shape[1]) < lengths[:, None])).any(axis=1)
    wrong = np.flatnonzero(inconsistent | (np.maximum(lengths, 1) != stated))
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"{path}: row {row}: len_seq is {int(stated[row])} but seq holds {int(lengths[row])} items before its "
            f"padding ({padding}); the frame and the title list do not belong together"
        )
    return history, lengths, targets


def _ids(path: Path, column: str, values: np.ndarray, width: bool) -> np.ndarray:
    """A column's item ids as int64: [n], or [n, width] of a column of lists; (id, rating) pairs give their ids."""
    listed: list[Any] = values.tolist()
    ids: list[Any] = []
    expected = None
    for row, value in enumerate(listed):
        if width:
            good = isinstance(value, list | tuple) and (expected is None or len(value) == expected)
            flat = [_first(entry) for entry in value] if good else [None]
            expected = len(flat) if expected is None else expected
        else:
            flat = [_first(value)]
        if not flat or not all(type(entry) is int and abs(entry) < 2**31 for entry in flat):
            expected_form = "a list of item ids, as long as the others" if width else "a whole number or (item, rating)"
            raise InputError(f"{path}: row {row}: {column} is {str(value)[:60]!r}, expected {expected_form}")
        ids.append(flat if width else flat[0])
    if width:
        return np.array(ids, dtype=np.int64).reshape(len(ids), expected or 0)
    return np.array(ids, dtype=np.int64)


def _first(entry: Any) -> Any:
    return entry[0] if isinstance(entry, tuple) and len(entry) == 2 else entry
