"""The Parquet files of a dataset folder, written and read a row group at a time; what is read is checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llara_dist.data.log import Log
from llara_dist.data.rows import ROWS_PER_CHUNK, Rows, RowSource
from llara_dist.errors import InputError

_INT_LIST = pa.list_(pa.int32())
COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "items.parquet": {"item_id": pa.int32(), "title": pa.string()},
    "interactions.parquet": {"user": pa.int32(), "item": pa.int32(), "timestamp": pa.int64()},
    "train.parquet": {"key": pa.uint64(), "user": pa.int32(), "history": _INT_LIST, "target": pa.int32()},
    "val.parquet": {"key": pa.uint64(), "user": pa.int32(), "history": _INT_LIST, "target": pa.int32()},
    "test.parquet": {"key": pa.uint64(), "user": pa.int32(), "history": _INT_LIST, "target": pa.int32()},
    "candidates.parquet": {"key": pa.uint64(), "split": pa.string(), "candidates": _INT_LIST},
}


def write_parquet(path: Path, tables: Iterator[pa.Table]) -> None:
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


def items_tables(log: Log) -> Iterator[pa.Table]:
    """items.parquet in chunks."""
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


def interactions_tables(log: Log) -> Iterator[pa.Table]:
    """interactions.parquet in chunks."""
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


def rows_tables(source: RowSource) -> Iterator[pa.Table]:
    """A split's file in chunks."""
    for start in _starts(len(source)):
        yield _rows_table(source.chunk(start, min(start + ROWS_PER_CHUNK, len(source))))


def candidates_tables(splits: Mapping[str, RowSource], candidates: Mapping[str, np.ndarray]) -> Iterator[pa.Table]:
    """candidates.parquet: validation, then test, in chunks that do not end where a split does."""
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


def _read_batches(file: Path) -> Iterator[pa.Table]:
    """The columns that count, a row group at a time; at least one table, if an empty one."""
    try:
        with pq.ParquetFile(file) as opened:
            _check_columns(file, opened.schema_arrow)
            for number in range(opened.num_row_groups):
                table = opened.read_row_group(number, columns=list(COLUMNS[file.name]))
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
    for column, kind in COLUMNS[file.name].items():
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


def read_table(file: Path) -> pa.Table:
    """A small file whole.

    Raises:
        InputError: missing, no Parquet file, or with other columns than it should have.
    """
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


def read_rows(file: Path, num_items: int, first_key: int, info: dict[str, Any]) -> Iterator[Rows]:
    """The rows of a split, a row group at a time.

    Args:
        file: train.parquet, val.parquet or test.parquet.
        num_items: size of the catalogue.
        first_key: the key of the first row.
        info: dataset.json.

    Raises:
        InputError: missing, damaged, or a key, item or history length is wrong (names the row).
    """
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


def read_interactions(file: Path, num_items: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Users and items of the events, int32, a row group at a time.

    Raises:
        InputError: missing, damaged, or a user or item is none.
    """
    events = 0
    for table in _read_batches(file):
        users, items = table["user"].to_numpy(), table["item"].to_numpy()
        _check_items(file, "item", items, num_items, events)
        if len(users) and users.min() < 0:
            raise InputError(f"{file}: user {users.min()}; user ids start at 0")
        events += len(users)
        yield users, items


def read_candidates(
    file: Path, num_rows: Mapping[str, int], targets: Mapping[str, np.ndarray], num_items: int, info: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The frozen candidates of validation and test, int32 [n, num_candidates] each.

    Raises:
        InputError: missing, damaged, or not the candidates of rows with these targets.
    """
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
