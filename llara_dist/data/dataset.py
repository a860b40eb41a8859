"""The dataset folder: windows, splits, frozen candidates and titles on disk; written whole, read checked.

Files: `items.parquet` (item_id, title, raw_id), `interactions.parquet` (user, item, timestamp, used),
`train|val|test.parquet` (key, user, history oldest first, target), `candidates.parquet` (key, split, candidates in
shown order; validation and test) and `dataset.json` (counts, audit, recipe, notes, sha256 of each file, hash),
which is written last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llara_dist.data.exclusions import row_exclusions, touched_items
from llara_dist.data.log import Log
from llara_dist.data.rows import Rows
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
_INT_LIST = pa.list_(pa.int32())
_COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "items.parquet": {"item_id": pa.int32(), "title": pa.string()},
    "interactions.parquet": {"user": pa.int32(), "item": pa.int32(), "timestamp": pa.int64()},
    "train.parquet": {"key": pa.uint64(), "user": pa.int32(), "history": _INT_LIST, "target": pa.int32()},
    "val.parquet": {"key": pa.uint64(), "user": pa.int32(), "history": _INT_LIST, "target": pa.int32()},
    "test.parquet": {"key": pa.uint64(), "user": pa.int32(), "history": _INT_LIST, "target": pa.int32()},
    "candidates.parquet": {"key": pa.uint64(), "split": pa.string(), "candidates": _INT_LIST},
}


@dataclass(frozen=True)
class Dataset:
    """A dataset folder in memory."""

    path: Path
    info: dict[str, Any]
    """`dataset.json`."""
    titles: list[str]
    """By item id."""
    train: Rows
    val: Rows
    test: Rows
    candidates: dict[str, np.ndarray]
    """"val" and "test": int32 [n, num_candidates], in shown order."""
    interactions: tuple[np.ndarray, np.ndarray]
    """Users and items of all known events, int32 [m] each; empty where the source stores none."""

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
        """The rows of "train", "val" or "test"."""
        if split not in SPLITS:
            raise InputError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
        return getattr(self, split)

    @cached_property
    def touched(self) -> tuple[np.ndarray, np.ndarray]:
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
    splits: Mapping[str, Rows],
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
    used = np.ones(len(log), dtype=bool) if log.used is None else log.used
    raw_ids = log.item_ids or [str(item) for item in range(log.num_items)]
    tables = {
        "items.parquet": pa.table(
            {
                "item_id": pa.array(np.arange(log.num_items, dtype=np.int32)),
                "title": pa.array(log.titles, pa.string()),
                "raw_id": pa.array(raw_ids, pa.string()),
            }
        ),
        "interactions.parquet": pa.table(
            {
                "user": pa.array(log.users.astype(np.int32)),
                "item": pa.array(log.items.astype(np.int32)),
                "timestamp": pa.array(log.timestamps.astype(np.int64)),
                "used": pa.array(used),
            }
        ),
        **{f"{split}.parquet": _rows_table(splits[split]) for split in SPLITS},
        "candidates.parquet": pa.table(
            {
                "key": pa.array(np.concatenate([splits[split].keys for split in ("val", "test")])),
                "split": pa.array(["val"] * len(splits["val"]) + ["test"] * len(splits["test"]), pa.string()),
                "candidates": _int_lists(np.concatenate([candidates["val"], candidates["test"]])),
            }
        ),
    }
    with staged_folder(out, replace=replace) as staging:
        for file, table in tables.items():
            pq.write_table(table, staging / file, compression="zstd", store_schema=False)
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


def _rows_table(rows: Rows) -> pa.Table:
    history = pa.ListArray.from_arrays(
        pa.array(rows.offsets.astype(np.int32)), pa.array(rows.items.astype(np.int32)), type=_INT_LIST
    )
    users = pa.array(rows.users.astype(np.int32), mask=rows.users < 0)
    return pa.table(
        {
            "key": pa.array(rows.keys.astype(np.uint64)),
            "user": users,
            "history": history,
            "target": pa.array(rows.targets.astype(np.int32)),
        }
    )


def _int_lists(matrix: np.ndarray) -> pa.ListArray:
    offsets = np.arange(len(matrix) + 1, dtype=np.int32) * matrix.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(matrix.reshape(-1).astype(np.int32)), type=_INT_LIST)


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
    tables = {file: _read_table(path / file) for file in _COLUMNS}
    items = tables["items.parquet"]
    num_items = len(items)
    if not np.array_equal(items["item_id"].to_numpy(), np.arange(num_items)):
        raise InputError(f"{path / 'items.parquet'}: item_id is not 0..{num_items - 1} in order")
    splits, first_key = {}, 0
    for split in SPLITS:
        splits[split] = _read_rows(path / f"{split}.parquet", tables[f"{split}.parquet"], num_items, first_key, info)
        first_key += len(splits[split])
    log = tables["interactions.parquet"]
    users, items_seen = log["user"].to_numpy(), log["item"].to_numpy()
    _check_items(path / "interactions.parquet", "item", items_seen, num_items)
    if len(users) and users.min() < 0:
        raise InputError(f"{path / 'interactions.parquet'}: user {users.min()}; user ids start at 0")
    titles = items["title"].to_pylist()
    if not all(titles):
        raise InputError(f"{path / 'items.parquet'}: the title of item {titles.index('')} is empty")
    return Dataset(
        path=path,
        info=info,
        titles=titles,
        candidates=_read_candidates(path / "candidates.parquet", tables["candidates.parquet"], splits, num_items, info),
        interactions=(users, items_seen),
        **splits,
    )


def _check_hashes(path: Path, info: dict[str, Any]) -> None:
    for file in _COLUMNS:
        if not (path / file).is_file():
            raise InputError(f"{path / file}: not found; the dataset folder is incomplete, run `llara-dist prepare`")
        if sha256_file(path / file) != info["files"].get(file):
            raise InputError(
                f"{path / file}: its sha256 is not the one in dataset.json; the file was changed or damaged, "
                "run `llara-dist prepare` again"
            )
    if sha256_json(info["files"]) != info["hash"]:
        raise InputError(f"{path / 'dataset.json'}: 'hash' does not belong to 'files'; run `llara-dist prepare` again")


def _read_table(file: Path) -> pa.Table:
    try:
        table = pq.read_table(file)
    except FileNotFoundError:
        raise InputError(f"{file}: not found; the dataset folder is incomplete, run `llara-dist prepare`") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
    for column, kind in _COLUMNS[file.name].items():
        found = table.schema.field(column).type if column in table.column_names else None
        # Parquet may name a list's values "item" or "element": the value type is what counts.
        same = found == kind or (
            found is not None
            and pa.types.is_list(found)
            and pa.types.is_list(kind)
            and found.value_type == kind.value_type
        )
        if not same:
            raise InputError(f"{file}: column {column!r} is {found or 'missing'}, expected {kind}")
        if table[column].null_count and column != "user":
            raise InputError(f"{file}: column {column!r} has {table[column].null_count} null values, expected none")
    return table.combine_chunks()


def _lists(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets int64 [n + 1] (from 0) and values int32 of a list column."""
    chunks = table[column]
    if len(chunks) == 0:
        return np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int32)
    array = chunks.combine_chunks() if isinstance(chunks, pa.ChunkedArray) else chunks
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    offsets = array.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], array.flatten().to_numpy().astype(np.int32)


def _check_items(file: Path, column: str, values: np.ndarray, num_items: int) -> None:
    wrong = np.flatnonzero((values < 0) | (values >= num_items))
    if len(wrong):
        raise InputError(
            f"{file}: {column} {int(values[wrong[0]])} (value {int(wrong[0])}) is no item; "
            f"items.parquet has 0..{num_items - 1}"
        )


def _read_rows(file: Path, table: pa.Table, num_items: int, first_key: int, info: dict[str, Any]) -> Rows:
    keys = table["key"].to_numpy()
    wrong = np.flatnonzero(keys != np.arange(first_key, first_key + len(keys), dtype=np.uint64))
    if len(wrong):
        raise InputError(
            f"{file}: row {int(wrong[0])} has key {int(keys[wrong[0]])}, expected {first_key + int(wrong[0])}"
        )
    offsets, items = _lists(table, "history")
    targets = table["target"].to_numpy()
    _check_items(file, "history", items, num_items)
    _check_items(file, "target", targets, num_items)
    lengths = np.diff(offsets)
    shortest = max(1, info["min_history"])
    wrong = np.flatnonzero((lengths < shortest) | (lengths > info["max_history"]))
    if len(wrong):
        raise InputError(
            f"{file}: row {int(wrong[0])} has {int(lengths[wrong[0]])} history items, allowed are {shortest} to "
            f"{info['max_history']} (min_history, max_history in dataset.json)"
        )
    users = table["user"].fill_null(-1).to_numpy().astype(np.int32)
    return Rows(keys=keys, users=users, offsets=offsets, items=items, targets=targets.astype(np.int32))


def _read_candidates(
    file: Path, table: pa.Table, splits: Mapping[str, Rows], num_items: int, info: dict[str, Any]
) -> dict[str, np.ndarray]:
    offsets, values = _lists(table, "candidates")
    wanted = info["num_candidates"]
    wrong = np.flatnonzero(np.diff(offsets) != wanted)
    if len(wrong):
        raise InputError(f"{file}: row {int(wrong[0])} does not have num_candidates = {wanted} candidates")
    _check_items(file, "candidates", values, num_items)
    expected = np.concatenate([splits["val"].keys, splits["test"].keys])
    if not np.array_equal(table["key"].to_numpy(), expected):
        raise InputError(f"{file}: keys are not those of val.parquet, then test.parquet")
    matrix = values.reshape(-1, wanted)
    targets = np.concatenate([splits["val"].targets, splits["test"].targets])
    missing = np.flatnonzero((matrix == targets[:, None]).sum(axis=1) != 1)
    if len(missing):
        raise InputError(f"{file}: row {int(missing[0])} does not hold its target exactly once")
    return {"val": matrix[: len(splits["val"])], "test": matrix[len(splits["val"]) :]}
