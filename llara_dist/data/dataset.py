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
import pyarrow as pa
import pyarrow.parquet as pq

from llara_dist.data.exclusions import row_exclusions, touched_items
from llara_dist.data.log import Log
from llara_dist.data.rows import ROWS_PER_CHUNK, Rows, RowSource, concatenate
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
        return _read_rows(self.path / f"{split}.parquet", self.num_items, first_key, self.info)

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
        batches = list(_read_interactions(self.path / "interactions.parquet", self.num_items))
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
    tables: dict[str, Iterator[pa.Table]] = {
        "items.parquet": _items_tables(log),
        "interactions.parquet": _interactions_tables(log),
        **{f"{split}.parquet": _rows_tables(splits[split]) for split in SPLITS},
        "candidates.parquet": _candidates_tables(splits, candidates),
    }
    with staged_folder(out, replace=replace) as staging:
        for file, parts in tables.items():
            _write_parquet(staging / file, parts)
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


def _write_parquet(path: Path, tables: Iterator[pa.Table]) -> None:
    """Write tables of at most `ROWS_PER_CHUNK` rows, one row group each."""
    writer = None
    for table in tables:
        if writer is None:
            writer = pq.ParquetWriter(path, table.schema, compression="zstd", store_schema=False)
        writer.write_table(table, row_group_size=ROWS_PER_CHUNK)
    assert writer is not None
    writer.close()


def _starts(rows: int) -> range:
    """Where the chunks of a table begin; a table without rows is one chunk."""
    return range(0, max(rows, 1), ROWS_PER_CHUNK)


def _items_tables(log: Log) -> Iterator[pa.Table]:
    raw_ids = log.item_ids or [str(item) for item in range(log.num_items)]
    for start in _starts(log.num_items):
        part = slice(start, min(start + ROWS_PER_CHUNK, log.num_items))
        yield pa.table(
            {
                "item_id": pa.array(np.arange(part.start, part.stop, dtype=np.int32)),
                "title": pa.array(log.titles[part], pa.string()),
                "raw_id": pa.array(raw_ids[part], pa.string()),
            }
        )


def _interactions_tables(log: Log) -> Iterator[pa.Table]:
    for start in _starts(len(log)):
        part = slice(start, start + ROWS_PER_CHUNK)
        users = log.users[part].astype(np.int32)
        yield pa.table(
            {
                "user": pa.array(users),
                "item": pa.array(log.items[part].astype(np.int32)),
                "timestamp": pa.array(log.timestamps[part].astype(np.int64)),
                "used": pa.array(np.ones(len(users), dtype=bool) if log.used is None else log.used[part]),
            }
        )


def _rows_tables(source: RowSource) -> Iterator[pa.Table]:
    for start in _starts(len(source)):
        yield _rows_table(source.chunk(start, min(start + ROWS_PER_CHUNK, len(source))))


def _candidates_tables(splits: Mapping[str, RowSource], candidates: Mapping[str, np.ndarray]) -> Iterator[pa.Table]:
    """Validation, then test, in chunks that do not end where a split does."""
    first = {"val": len(splits["train"]), "test": len(splits["train"]) + len(splits["val"])}
    total = len(splits["val"]) + len(splits["test"])
    for start in _starts(total):
        keys, names, lists = [], [], []
        for split, offset in (("val", 0), ("test", len(splits["val"]))):
            low, high = (min(max(at - offset, 0), len(splits[split])) for at in (start, start + ROWS_PER_CHUNK))
            keys.append(np.arange(first[split] + low, first[split] + high, dtype=np.uint64))
            names += [split] * (high - low)
            lists.append(candidates[split][low:high])
        yield pa.table(
            {
                "key": pa.array(np.concatenate(keys)),
                "split": pa.array(names, pa.string()),
                "candidates": _int_lists(np.concatenate(lists)),
            }
        )


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
    items = _read_table(path / "items.parquet")
    num_items = len(items)
    if not np.array_equal(items["item_id"].to_numpy(), np.arange(num_items)):
        raise InputError(f"{path / 'items.parquet'}: item_id is not 0..{num_items - 1} in order")
    num_rows: dict[str, int] = {}
    targets: dict[str, np.ndarray] = {}
    for split in SPLITS:
        rows, kept = 0, [np.zeros(0, np.int32)]
        for part in _read_rows(path / f"{split}.parquet", num_items, sum(num_rows.values()), info):
            rows += len(part)
            if split != "train":
                kept.append(part.targets)
        num_rows[split], targets[split] = rows, np.concatenate(kept)
    for _ in _read_interactions(path / "interactions.parquet", num_items):
        pass  # every batch is checked as it is read
    titles = items["title"].to_pylist()
    if not all(titles):
        raise InputError(f"{path / 'items.parquet'}: the title of item {titles.index('')} is empty")
    return Dataset(
        path=path,
        info=info,
        titles=titles,
        num_rows=num_rows,
        candidates=_read_candidates(path / "candidates.parquet", num_rows, targets, num_items, info),
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


def _read_batches(file: Path) -> Iterator[pa.Table]:
    """The columns that count, a row group at a time; at least one table, if an empty one."""
    try:
        with pq.ParquetFile(file) as opened:
            _check_columns(file, opened.schema_arrow)
            for number in range(opened.num_row_groups):
                table = opened.read_row_group(number, columns=list(_COLUMNS[file.name]))
                for column in table.column_names:
                    if table[column].null_count and column != "user":
                        raise InputError(
                            f"{file}: column {column!r} has {table[column].null_count} null values, expected none"
                        )
                yield table.combine_chunks()
            if opened.num_row_groups == 0:
                yield opened.schema_arrow.empty_table()
    except FileNotFoundError:
        raise InputError(f"{file}: not found; the dataset folder is incomplete, run `llara-dist prepare`") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _check_columns(file: Path, schema: pa.Schema) -> None:
    for column, kind in _COLUMNS[file.name].items():
        found = schema.field(column).type if column in schema.names else None
        # Parquet may name a list's values "item" or "element": the value type is what counts.
        same = found == kind or (
            found is not None
            and pa.types.is_list(found)
            and pa.types.is_list(kind)
            and found.value_type == kind.value_type
        )
        if not same:
            raise InputError(f"{file}: column {column!r} is {found or 'missing'}, expected {kind}")


def _read_table(file: Path) -> pa.Table:
    return pa.concat_tables(_read_batches(file)).combine_chunks()


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


def _check_items(file: Path, column: str, values: np.ndarray, num_items: int, before: int = 0) -> None:
    """Refuse values that are no item; `before` values of the column were read earlier."""
    wrong = np.flatnonzero((values < 0) | (values >= num_items))
    if len(wrong):
        raise InputError(
            f"{file}: {column} {int(values[wrong[0]])} (value {before + int(wrong[0])}) is no item; "
            f"items.parquet has 0..{num_items - 1}"
        )


def _read_rows(file: Path, num_items: int, first_key: int, info: dict[str, Any]) -> Iterator[Rows]:
    """The rows of a split, checked, a row group at a time."""
    shortest = max(1, info["min_history"])
    row = history_items = 0
    for table in _read_batches(file):
        keys = table["key"].to_numpy()
        expected = np.arange(first_key + row, first_key + row + len(keys), dtype=np.uint64)
        wrong = np.flatnonzero(keys != expected)
        if len(wrong):
            place = int(wrong[0])
            raise InputError(f"{file}: row {row + place} has key {int(keys[place])}, expected {int(expected[place])}")
        offsets, items = _lists(table, "history")
        targets = table["target"].to_numpy().astype(np.int32)
        _check_items(file, "history", items, num_items, history_items)
        _check_items(file, "target", targets, num_items, row)
        lengths = np.diff(offsets)
        wrong = np.flatnonzero((lengths < shortest) | (lengths > info["max_history"]))
        if len(wrong):
            raise InputError(
                f"{file}: row {row + int(wrong[0])} has {int(lengths[wrong[0]])} history items, allowed are "
                f"{shortest} to {info['max_history']} (min_history, max_history in dataset.json)"
            )
        users = table["user"].fill_null(-1).to_numpy().astype(np.int32)
        row += len(keys)
        history_items += len(items)
        yield Rows(keys=keys, users=users, offsets=offsets, items=items, targets=targets)


def _read_interactions(file: Path, num_items: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Users and items of the events, checked, int32, a row group at a time."""
    events = 0
    for table in _read_batches(file):
        users, items = table["user"].to_numpy(), table["item"].to_numpy()
        _check_items(file, "item", items, num_items, events)
        if len(users) and users.min() < 0:
            raise InputError(f"{file}: user {users.min()}; user ids start at 0")
        events += len(users)
        yield users, items


def _read_candidates(
    file: Path, num_rows: Mapping[str, int], targets: Mapping[str, np.ndarray], num_items: int, info: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The frozen candidates of validation and test, checked against the rows' targets."""
    wanted = info["num_candidates"]
    asked = np.concatenate([targets["val"], targets["test"]])
    keys, parts, row = [], [np.zeros((0, wanted), np.int32)], 0
    for table in _read_batches(file):
        offsets, values = _lists(table, "candidates")
        wrong = np.flatnonzero(np.diff(offsets) != wanted)
        if len(wrong):
            raise InputError(f"{file}: row {row + int(wrong[0])} does not have num_candidates = {wanted} candidates")
        _check_items(file, "candidates", values, num_items, row * wanted)
        matrix = values.reshape(-1, wanted)
        keys.append(table["key"].to_numpy())
        parts.append(matrix)
        row += len(matrix)
    matrix = np.concatenate(parts)
    if not np.array_equal(np.concatenate(keys), num_rows["train"] + np.arange(len(asked), dtype=np.uint64)):
        raise InputError(f"{file}: keys are not those of val.parquet, then test.parquet")
    missing = np.flatnonzero((matrix == asked[:, None]).sum(axis=1) != 1)
    if len(missing):
        raise InputError(f"{file}: row {int(missing[0])} does not hold its target exactly once")
    return {"val": matrix[: num_rows["val"]], "test": matrix[num_rows["val"] :]}
