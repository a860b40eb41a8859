"""The dataset folder: windows, splits, frozen candidates and titles on disk; written whole, read checked.

Files: `items.parquet` (item_id, title, raw_id), `interactions.parquet` (user, item, timestamp, used),
`train|val|test.parquet` (key, user, history oldest first, target), `candidates.parquet` (key, split, candidates in
shown order; validation and test) and `dataset.json` (counts, audit, recipe, notes, sha256 of each file, hash),
which is written last.

A split may be larger than memory: it is written, checked and read in chunks of one Parquet row group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist.data.dataset_tables import (
    COLUMNS,
    candidates_tables,
    interactions_tables,
    items_tables,
    read_candidates,
    read_interactions,
    read_rows,
    read_table,
    rows_tables,
    write_parquet,
)
from llara_dist.data.exclusions import row_exclusions, touched_items
from llara_dist.data.log import Log
from llara_dist.data.rows import Rows, RowSource, concatenate
from llara_dist.data.wording import DOMAINS
from llara_dist.errors import InputError
from llara_dist.integrity import read_json, sha256_file, sha256_json, staged_folder, write_json

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")

_INFO_FIELDS = {
    "hash": str,
    "domain": str,
    "max_history": int,
    "min_history": int,
    "num_candidates": int,
    "files": dict,
    "counts": dict,
}


@dataclass(frozen=True)
class Dataset:
    """A dataset folder that was checked; its rows are read when they are asked for."""

    path: Path
    info: dict[str, Any]
    """`dataset.json`."""
    titles: list[str]
    """By item id."""
    num_rows: dict[str, int]
    """By split."""
    candidates: dict[str, np.ndarray]
    """"val" and "test": int32 [n, num_candidates], in shown order."""

    @property
    def hash(self) -> str:
        """Hex sha256 that names the folder's content."""
        return self.info["hash"]

    @property
    def num_items(self) -> int:
        """Size of the catalogue."""
        return len(self.titles)

    @property
    def domain(self) -> str:
        """movie, game or artist."""
        return self.info["domain"]

    @property
    def max_history(self) -> int:
        """The longest history a row may have."""
        return self.info["max_history"]

    @property
    def num_candidates(self) -> int:
        """How many candidates a row shows, the target included."""
        return self.info["num_candidates"]

    def rows(self, split: str) -> Rows:
        """All rows of "train", "val" or "test" in memory, some 70 bytes each; `chunks` needs no more than one chunk."""
        if split not in SPLITS:
            raise InputError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
        return getattr(self, split)

    def chunks(self, split: str) -> Iterator[Rows]:
        """The rows of a split in order, about a million at once.

        Raises:
            InputError: the file is damaged.
        """
        first_key = sum(self.num_rows[name] for name in SPLITS[: SPLITS.index(split)])
        return read_rows(self.path / f"{split}.parquet", self.num_items, first_key, self.info)

    @cached_property
    def train(self) -> Rows:
        return concatenate(list(self.chunks("train")))

    @cached_property
    def val(self) -> Rows:
        return concatenate(list(self.chunks("val")))

    @cached_property
    def test(self) -> Rows:
        return concatenate(list(self.chunks("test")))

    @property
    def interactions(self) -> tuple[np.ndarray, np.ndarray]:
        """Users and items of all known events, int32 [m] each, read anew; empty where the source stores none."""
        batches = list(read_interactions(self.path / "interactions.parquet", self.num_items))
        users, items = [batch[0] for batch in batches], [batch[1] for batch in batches]
        none = np.zeros(0, np.int32)
        return np.concatenate([none, *users]), np.concatenate([none, *items])

    @cached_property
    def touched(self) -> tuple[np.ndarray, np.ndarray]:
        """What each user ever touched: CSR by user (offsets int64 [users + 1], items int32, sorted, no repeats)."""
        return touched_items(*self.interactions, self.num_items)

    def exclusions(self, split: str, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """What each row may not show as a negative: all that its user ever touched, its window and its target.

        Where the user is not known (LLaRA's own folders) that is the window and the target alone.

        Args:
            split: "train", "val" or "test".
            start: first row; a large split is asked for in parts.
            stop: row after the last, None for the end.

        Returns:
            CSR (offsets int64 [n + 1], items int32): repeats allowed, in no particular order.
        """
        rows = self.rows(split)
        stop = len(rows) if stop is None else min(stop, len(rows))
        return row_exclusions(rows, *self.touched, start=start, stop=stop)


def write_dataset(
    out: Path,
    *,
    name: str,
    log: Log,
    splits: Mapping[str, RowSource],
    candidates: Mapping[str, np.ndarray],
    recipe: dict[str, Any],
    max_history: int,
    min_history: int,
    counts: dict[str, Any],
    audit: dict[str, Any],
    notes: list[str],
    replace: bool = False,
) -> dict[str, Any]:
    """Write a dataset folder, whole or not at all; the same content gives the same bytes.

    Args:
        out: the folder to make.
        name: the data set's name.
        log: events (may be none) and titles by item id.
        splits: "train", "val", "test" → rows; keys sequential over the three, in that order.
        candidates: "val", "test" → int32 [n, num_candidates] in shown order.
        recipe: what made it, kept in dataset.json.
        max_history: the longest history of a row.
        min_history: the shortest.
        counts: numbers for people, kept in dataset.json beside the ones counted here.
        audit: what the audit found, kept in dataset.json.
        notes: what a reader must know, one sentence each.
        replace: whether an existing folder may be replaced.

    Returns:
        dataset.json as written.

    Raises:
        InputError: `out` exists already.
    """
    num_candidates = int(candidates["val"].shape[1])
    tables = {
        "items.parquet": items_tables(log),
        "interactions.parquet": interactions_tables(log),
        **{f"{split}.parquet": rows_tables(splits[split]) for split in SPLITS},
        "candidates.parquet": candidates_tables(splits, candidates),
    }
    with staged_folder(out, replace=replace) as staging:
        for file, parts in tables.items():
            write_parquet(staging / file, parts)
        hashes = {file: sha256_file(staging / file) for file in tables}
        info = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "domain": log.domain,
            "timestamp_unit": log.timestamp_unit,
            "counts": {
                "items": log.num_items,
                "interactions": len(log),
                **{split: len(splits[split]) for split in SPLITS},
                **counts,
            },
            "max_history": max_history,
            "min_history": min_history,
            "num_candidates": num_candidates,
            "recipe": recipe,
            "audit": audit,
            "notes": notes,
            "files": hashes,
            "hash": sha256_json(hashes),
        }
        write_json(staging / "dataset.json", info)
    return info


def load_dataset(path: Path, verify: bool = True) -> Dataset:
    """Read a dataset folder and check it.

    Args:
        path: the folder.
        verify: whether to compare each file's sha256 with dataset.json (columns and id ranges are always checked).

    Raises:
        InputError: a file is missing, damaged, of another format version, or refers to an item that is not there.
    """
    path = Path(path)
    info = read_json(path / "dataset.json", "a dataset folder (made by `llara-dist prepare`)")
    if info.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path / 'dataset.json'}: format_version {info.get('format_version')!r}, this release reads "
            f"{FORMAT_VERSION}; run `llara-dist prepare` again"
        )
    for field, kind in _INFO_FIELDS.items():
        if not isinstance(info.get(field), kind):
            found = f"is {info[field]!r}, no {kind.__name__}" if field in info else "is missing"
            raise InputError(f"{path / 'dataset.json'}: field {field!r} {found}; run `llara-dist prepare` again")
    if info["domain"] not in DOMAINS:
        raise InputError(
            f"{path / 'dataset.json'}: domain {info['domain']!r}, expected one of {', '.join(DOMAINS)}; run "
            "`llara-dist prepare` again"
        )
    if verify:
        _check_hashes(path, info)
    items = read_table(path / "items.parquet")
    num_items = len(items)
    if not np.array_equal(items["item_id"].to_numpy(), np.arange(num_items)):
        raise InputError(f"{path / 'items.parquet'}: item_id is not 0..{num_items - 1} in order")
    num_rows: dict[str, int] = {}
    targets: dict[str, np.ndarray] = {}
    for split in SPLITS:
        rows, kept = 0, [np.zeros(0, np.int32)]
        for part in read_rows(path / f"{split}.parquet", num_items, sum(num_rows.values()), info):
            rows += len(part)
            if split != "train":
                kept.append(part.targets)
        num_rows[split], targets[split] = rows, np.concatenate(kept)
    for _ in read_interactions(path / "interactions.parquet", num_items):
        pass  # every batch is checked as it is read
    titles = items["title"].to_pylist()
    if not all(titles):
        raise InputError(f"{path / 'items.parquet'}: the title of item {titles.index('')} is empty")
    return Dataset(
        path=path,
        info=info,
        titles=titles,
        num_rows=num_rows,
        candidates=read_candidates(path / "candidates.parquet", num_rows, targets, num_items, info),
    )


def _check_hashes(path: Path, info: dict[str, Any]) -> None:
    for file in COLUMNS:
        if not (path / file).is_file():
            raise InputError(f"{path / file}: not found; the dataset folder is incomplete, run `llara-dist prepare`")
        if sha256_file(path / file) != info["files"].get(file):
            raise InputError(
                f"{path / file}: its sha256 is not the one in dataset.json; the file was changed or damaged, "
                "run `llara-dist prepare` again"
            )
    if sha256_json(info["files"]) != info["hash"]:
        raise InputError(f"{path / 'dataset.json'}: 'hash' does not belong to 'files'; run `llara-dist prepare` again")
