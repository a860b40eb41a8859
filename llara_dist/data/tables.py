"""Any CSV or Parquet log: (user, item, timestamp[, rating]) beside (item, title); columns are named by the recipe.

Files go by in batches: what stays in memory of an event is 17 bytes, and of a wrong row its place.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from llara_dist.data.log import Log
from llara_dist.errors import InputError

_BATCH_BYTES = 32 << 20
"""of a CSV file, read at once"""
_BATCH_ROWS = 1 << 20
"""of a Parquet file, read at once"""


@dataclass(frozen=True)
class TableSource:
    """Two files, relative to --raw, and what their columns are called."""

    kind: Literal["table"]
    events: str
    """File of events, .csv, .tsv or .parquet."""
    items: str
    """File of items, .csv, .tsv or .parquet."""
    user: str = "user"
    """Events: column of the user id, any text or number."""
    item: str = "item"
    """Events: column of the item id."""
    timestamp: str = "timestamp"
    """Events: column of the time."""
    timestamp_unit: Literal["s", "ms", "us", "ns", "iso"] = "s"
    """What the time counts since 1970; iso: a date and time as text, or a Parquet date column; kept as us."""
    rating: str | None = None
    """Events: column of the rating, if there is one."""
    min_rating: float | None = None
    """Events rated lower make no sequence, but are never drawn as negatives; needs `rating`."""
    item_id: str = "item"
    """Items: column of the item id."""
    title: str = "title"
    """Items: column of the title."""
    unknown_items: Literal["error", "drop"] = "error"
    """What to do with an event of an item that the items file does not list; dropped ones are counted."""
    encoding: str = "utf-8"
    """Of the CSV files."""

    def __post_init__(self) -> None:
        if self.min_rating is not None and self.rating is None:
            raise InputError("source.min_rating is set, but source.rating does not name the column of the rating")


def read_tables(raw: Path, source: TableSource, domain: str) -> tuple[Log, dict[str, int]]:
    """Read a log and its catalogue.

    Item ids follow the order of the items file, user ids the order of first appearance.

    Args:
        raw: folder that `source.events` and `source.items` are relative to.
        source: file and column names.
        domain: movie, game or artist.

    Returns:
        The log, events in file order, raw titles; and counts (events of unknown items dropped).

    Raises:
        InputError: a file or column is missing, a row is malformed (with its line), an id is empty, an item is
            listed twice, an event names an unknown item.
    """
    items_path, events_path = raw / source.items, raw / source.events
    item_ids, titles = _read_items(items_path, source)
    wrong = _WrongRows(events_path, source.encoding)
    users: list[np.ndarray] = []
    items: list[np.ndarray] = []
    times: list[np.ndarray] = []
    used: list[np.ndarray] = []
    known_users = pl.Series(dtype=pl.String)
    clock = _Clock(source)
    dropped = 0
    wanted = [source.user, source.item, source.timestamp, *([source.rating] if source.rating else [])]
    for batch in _read_batches(events_path, wanted, source.encoding):
        user_ids = _ids(wrong, batch, source.user)
        event_items = _ids(wrong, batch, source.item)
        known_users, user_places = _number(user_ids, known_users)
        item_places = _positions(event_items, item_ids)
        moments = clock.read(wrong, batch[source.timestamp])
        if source.rating and source.min_rating is not None:
            ratings = batch[source.rating].cast(pl.Float64, strict=False)
            no_number = ratings.is_null() | ratings.is_nan().fill_null(True)
            wrong.add(no_number, batch[source.rating], "rating", "is no number")
            good = ratings >= source.min_rating
        else:
            good = pl.repeat(True, len(batch), dtype=pl.Boolean, eager=True)
        unknown = item_places.is_null()
        if source.unknown_items == "error":
            problem = f"is not in {source.items}; add it there or set source.unknown_items: drop"
            wrong.add(unknown, event_items, "item", problem)
        wrong.next_batch(len(batch))
        if wrong.found:
            continue  # only to count the others
        kept = ~unknown
        dropped += int(unknown.sum())
        users.append(user_places.filter(kept).to_numpy().astype(np.int32))
        items.append(item_places.filter(kept).to_numpy().astype(np.int32))
        times.append(moments.filter(kept).to_numpy().astype(np.int64))
        used.append(good.filter(kept).to_numpy())
    wrong.report()
    if not wrong.rows_read:
        raise InputError(f"{events_path}: holds no event")
    log = Log(
        users=_join(users),
        items=_join(items),
        timestamps=_join(times),
        titles=titles,
        domain=domain,
        used=_join(used),
        item_ids=item_ids.to_list(),
        user_ids=known_users.to_list(),
        timestamp_unit="us" if source.timestamp_unit == "iso" else source.timestamp_unit,
    )
    return log, {"events_of_unknown_items_dropped": dropped}


def _read_items(path: Path, source: TableSource) -> tuple[pl.Series, list[str]]:
    """Raw item ids and titles, in file order; the catalogue is read whole."""
    wrong = _WrongRows(path, source.encoding)
    batches = list(_read_batches(path, [source.item_id, source.title], source.encoding))
    if not batches:
        return pl.Series(dtype=pl.String), []
    items = pl.concat(batches)
    item_ids = _ids(wrong, items, source.item_id)
    wrong.add(~item_ids.is_first_distinct(), item_ids, "item", "is listed twice")
    wrong.report()
    return item_ids, items[source.title].cast(pl.String).fill_null("").to_list()


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenate and let go of the parts, so that no other column waits beside its copy."""
    whole = np.concatenate(parts)
    parts.clear()
    return whole


def _number(ids: pl.Series, known: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Ids known so far with the new ones after them, by first appearance; and the place of each id among them."""
    fresh = ids.filter(_positions(ids, known).is_null()).unique(maintain_order=True)
    known = pl.concat([known, fresh])
    return known, _positions(ids, known)


def _positions(values: pl.Series, known: pl.Series) -> pl.Series:
    """Index of each value among the (distinct) known ones, null where it is not known."""
    left = pl.DataFrame({"id": values})
    right = pl.DataFrame({"id": known}).with_row_index("place")
    return left.join(right, on="id", how="left", maintain_order="left")["place"]


@dataclass
class _WrongRows:
    """The first wrong row of each kind in a file, and how many there are; reported when all rows went by."""

    path: Path
    encoding: str
    rows_read: int = 0
    found: dict[str, tuple[int, str, int]] = field(default_factory=dict)
    """Column and problem → first row, text of the error, number of rows."""

    def add(self, wrong: pl.Series, values: pl.Series, column: str, problem: str) -> None:
        """Note the rows of the batch at hand that are wrong."""
        rows = wrong.arg_true()
        if not len(rows):
            return
        text = f"{column} {values[int(rows[0])]!r} {problem}"
        row, text, number = self.found.get(f"{column} {problem}", (self.rows_read + int(rows[0]), text, 0))
        self.found[f"{column} {problem}"] = row, text, number + len(rows)

    def next_batch(self, rows: int) -> None:
        """The batch at hand, of so many rows, is done."""
        self.rows_read += rows

    def report(self) -> None:
        """Raise for a wrong row, with its line in a CSV file or its row in a Parquet file."""
        if self.found:
            row, text, number = min(self.found.values(), key=lambda found: found[0])
            more = f" ({number} rows in all)" if number > 1 else ""
            raise InputError(f"{self.path}: {_where(self.path, row, self.encoding)}: {text}{more}")


def _ids(wrong: _WrongRows, frame: pl.DataFrame, column: str) -> pl.Series:
    values = frame[column]
    if values.dtype.is_float():  # what pandas makes of whole numbers with a gap
        values = values.cast(pl.Int64, strict=False)
    values = values.cast(pl.String).str.strip_chars()
    wrong.add(values.is_null() | (values == "").fill_null(True), values, column, "is empty")
    return values


@dataclass
class _Clock:
    """Reads the column of times, batch after batch."""

    source: TableSource
    pattern: pl.Series | None = None
    """The first time that could be read, as text: its form is the form of the whole column."""

    def read(self, wrong: _WrongRows, given: pl.Series) -> pl.Series:
        """Times as int64 since 1970, null where they cannot be read."""
        numbers, problem = self._iso(given) if self.source.timestamp_unit == "iso" else self._whole(given)
        wrong.add(numbers.is_null(), given, self.source.timestamp, problem)
        return numbers

    def _iso(self, values: pl.Series) -> tuple[pl.Series, str]:
        problem = "is no ISO date and time"
        if values.dtype != pl.String:
            return values.cast(pl.Datetime("us"), strict=False).to_physical(), problem
        values = values.str.strip_chars()
        begin = pl.Series(values.name, [], pl.String) if self.pattern is None else self.pattern.alias(values.name)
        # Without a zone a time is taken as UTC; mixed forms of one column are an error, not a guess.
        text = pl.concat([begin, values])
        parsed = text.str.to_datetime(strict=False, time_unit="us", time_zone="UTC").slice(len(begin))
        if self.pattern is None and parsed.null_count() < len(parsed):
            self.pattern = values.filter(parsed.is_not_null()).head(1)
        return parsed.to_physical(), problem

    def _whole(self, values: pl.Series) -> tuple[pl.Series, str]:
        if values.dtype == pl.String:
            values = values.str.strip_chars()
        numbers = values.cast(pl.Int64, strict=False)
        if numbers.null_count():
            as_float = values.cast(pl.Float64, strict=False)
            floored = pl.select(pl.when(as_float == as_float.floor()).then(as_float)).to_series()
            numbers = numbers.fill_null(floored.cast(pl.Int64, strict=False))
        return numbers, f"is no whole number; source.timestamp_unit is {self.source.timestamp_unit}"


def _where(path: Path, row: int, encoding: str) -> str:
    """The place of data row `row` (from 0): a line number in text, where quoted line breaks and blank lines count."""
    if path.suffix == ".parquet":
        return f"row {row}"
    try:
        with open(path, encoding=encoding, errors="replace", newline="") as file:
            reader = csv.reader(file, delimiter=_separator(path))
            begins, record = 1, -1
            for fields in reader:
                if fields:
                    if record == row:
                        return f"line {begins}"
                    record += 1
                begins = reader.line_num + 1
    except csv.Error:
        pass
    return f"record {row + 1}"


def _separator(path: Path) -> str:
    return "\t" if path.suffix == ".tsv" else ","


def _read_batches(path: Path, columns: list[str], encoding: str) -> Iterator[pl.DataFrame]:
    """The named columns, so many rows at once; text as text, nothing guessed."""
    if not path.is_file():
        raise InputError(f"{path}: not found; source.events and source.items are relative to --raw")
    if path.suffix not in (".csv", ".tsv", ".parquet"):
        raise InputError(f"{path}: unknown ending; expected .csv, .tsv or .parquet")
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path, buffer_size=1 << 20) as file:
                _require_columns(path, columns, file.schema_arrow.names)
                for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                    yield _frame(batch)
        else:
            found = _header(path, encoding)
            _require_columns(path, columns, found)
            for batch in _open_csv(path, columns, found, encoding):
                yield _frame(batch)
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError, UnicodeError, LookupError) as error:
        raise InputError(f"{path}: {_explain(path, str(error), encoding)}") from None


def _frame(batch: pa.RecordBatch) -> pl.DataFrame:
    frame = pl.from_arrow(batch)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _header(path: Path, encoding: str) -> list[str]:
    # Undecodable bytes are left for the reader of the rows, which names the line.
    codec = "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding
    with open(path, encoding=codec, errors="replace", newline="") as file:
        return next((fields for fields in csv.reader(file, delimiter=_separator(path)) if fields), [])


def _require_columns(path: Path, columns: list[str], found: list[str]) -> None:
    for column in columns:
        if found.count(column) != 1:
            number = "is missing" if column not in found else "is there twice"
            raise InputError(
                f"{path}: column {column!r} {number}; found {', '.join(found)[:200] or 'none'}; name the columns in "
                "the recipe's source"
            )


def _open_csv(path: Path, columns: list[str], found: list[str], encoding: str) -> pyarrow.csv.CSVStreamingReader:
    return pyarrow.csv.open_csv(
        path,
        # One thread: only then does an error name its row.
        read_options=pyarrow.csv.ReadOptions(use_threads=False, encoding=encoding, block_size=_BATCH_BYTES),
        parse_options=pyarrow.csv.ParseOptions(delimiter=_separator(path), newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(found, pa.string()),
            include_columns=columns,
            strings_can_be_null=True,
            null_values=[""],
        ),
    )


def _explain(path: Path, message: str, encoding: str) -> str:
    line = " ".join(message.split())[:160]
    row = re.search(r"Row #(\d+): (.*)", line)
    if row is None:
        return f"{line}; expected a table with a header line"
    # pyarrow counts records from 1 with the header as the first.
    place = _where(path, int(row.group(1)) - 2, encoding)
    hint = "; set source.encoding, e.g. latin-1" if "UTF8" in line else ""
    return f"{place}: {row.group(2)}{hint}"
