"""MovieLens-100K as the publisher ships it: `u.data` (user, item, rating, time) and `u.item` (id|title|…)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from llara_dist.data.log import Log
from llara_dist.errors import InputError


def read_movielens(raw: Path, min_rating: float, drop_first_line: bool) -> Log:
    """Read a raw MovieLens-100K folder; item id = movie id − 1, user ids in the raw ids' order.

    Events below `min_rating` are kept but marked unused: they make no sequence, yet the user has seen the film, so
    it must not be drawn as a negative.

    Args:
        raw: folder with `u.data` (tab-separated) and `u.item` (latin-1).
        min_rating: lowest rating that counts as an interaction (LLaRA: 3).
        drop_first_line: leave the first event out of the sequences, as LLaRA's published split does (its authors
            read that line as a header).

    Returns:
        The log, events in file order, raw titles.

    Raises:
        InputError: a file is missing, a line is malformed, or an event names a film that u.item does not list.
    """
    titles = read_u_item(raw / "u.item")
    columns = _read_u_data(raw / "u.data")
    items = columns["item"] - 1
    unknown = np.flatnonzero((items < 0) | (items >= len(titles)))
    if len(unknown):
        line = int(unknown[0]) + 1
        raise InputError(f"{raw / 'u.data'}: line {line}: item {items[unknown[0]] + 1} is not in u.item")
    wrong = np.flatnonzero(columns["user"] < 1)
    if len(wrong):
        raise InputError(f"{raw / 'u.data'}: line {int(wrong[0]) + 1}: user {columns['user'][wrong[0]]} is not ≥ 1")
    used = columns["rating"] >= min_rating
    if drop_first_line:
        used[0] = False
    # In MovieLens-100K users are 1, 2, … without gaps, so this is raw id − 1; a gap must not cost memory.
    user_ids, users = np.unique(columns["user"], return_inverse=True)
    return Log(
        users=users.astype(np.int32),
        items=items.astype(np.int32),
        timestamps=columns["timestamp"],
        titles=titles,
        domain="movie",
        used=used,
        item_ids=[str(item + 1) for item in range(len(titles))],
        user_ids=[str(user) for user in user_ids],
    )


def read_u_item(path: Path) -> list[str]:
    """Raw titles by item id from `u.item` (id|title|…, ids 1, 2, … in order, latin-1).

    Raises:
        InputError: the file is missing or a line does not start with the next id and a title.
    """
    if not path.is_file():
        raise InputError(f"{path}: not found; expected MovieLens' item list (id|title|…)")
    titles = []
    for number, line in enumerate(path.read_bytes().decode("latin-1").splitlines(), start=1):
        fields = line.split("|")
        if len(fields) < 2 or fields[0] != str(number):
            raise InputError(f"{path}: line {number}: expected '{number}|title|…', found {line[:60]!r}")
        titles.append(fields[1])
    if not titles:
        raise InputError(f"{path}: is empty; expected MovieLens' item list (id|title|…)")
    return titles


def _read_u_data(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise InputError(f"{path}: not found; expected MovieLens' events (user, item, rating, timestamp)")
    names = ["user", "item", "rating", "timestamp"]
    lines = pl.Series(path.read_text(encoding="latin-1").splitlines(), dtype=pl.String)
    fields = lines.str.split("\t")
    frame = pl.DataFrame({"fields": fields}).select(
        pl.col("fields").list.len().alias("count"),
        *[
            pl.col("fields").list.get(place, null_on_oob=True).cast(pl.Int64, strict=False).alias(name)
            for place, name in enumerate(names)
        ],
    )
    malformed = frame.select(((pl.col("count") != 4) | pl.any_horizontal(pl.col(names).is_null())).arg_true())
    if len(malformed):
        row = int(malformed.item(0, 0))
        raise InputError(
            f"{path}: line {row + 1}: expected four tab-separated whole numbers (user, item, rating, timestamp), "
            f"found {lines[row][:60]!r}"
        )
    if not len(frame):
        raise InputError(f"{path}: is empty; expected MovieLens' events")
    return {name: frame[name].to_numpy().copy() for name in names}
