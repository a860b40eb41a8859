"""Any CSV or Parquet log: (user, item, timestamp[, rating]) beside (item, title); columns are named by the recipe."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from llara_dist.data.log import Log
from llara_dist.errors import InputError


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
    items = _read_columns(items_path, [source.item_id, source.title], source.encoding)
    item_ids = _ids(items_path, items, source.item_id, source.encoding)
    _reject(items_path, ~item_ids.is_first_distinct(), item_ids, "item", "is listed twice", source.encoding)
    titles = items[source.title].cast(pl.String).fill_null("").to_list()

    wanted = [source.user, source.item, source.timestamp, *([source.rating] if source.rating else [])]
    events = _read_columns(events_path, wanted, source.encoding)
    if not len(events):
        raise InputError(f"{events_path}: holds no event")
    user_ids = _ids(events_path, events, source.user, source.encoding)
    event_items = _ids(events_path, events, source.item, source.encoding)
    known_users = user_ids.unique(maintain_order=True)
    users = _positions(user_ids, known_users)
    item_places = _positions(event_items, item_ids)
    times = _times(events_path, events, source)
    used = np.ones(len(events), dtype=bool)
    if source.rating and source.min_rating is not None:
        ratings = events[source.rating].cast(pl.Float64, strict=False)
        wrong = ratings.is_null() | ratings.is_nan().fill_null(True)
        _reject(events_path, wrong, events[source.rating], "rating", "is no number", source.encoding)
        used = (ratings >= source.min_rating).to_numpy()
    unknown = item_places.is_null()
    if source.unknown_items == "error":
        problem = f"is not in {source.items}; add it there or set source.unknown_items: drop"
        _reject(events_path, unknown, event_items, "item", problem, source.encoding)
    kept = (~unknown).to_numpy()
    log = Log(
        users=users.to_numpy()[kept].astype(np.int32),
        items=item_places.filter(~unknown).to_numpy().astype(np.int32),
        timestamps=times[kept],
        titles=titles,
        domain=domain,
        used=used[kept],
        item_ids=item_ids.to_list(),
        user_ids=known_users.to_list(),
        timestamp_unit="us" if source.timestamp_unit == "iso" else source.timestamp_unit,
    )
    return log, {"events_of_unknown_items_dropped": int((~kept).sum())}


def _positions(values: pl.Series, known: pl.Series) -> pl.Series:
    """Index of each value among the (distinct) known ones, null where it is not known."""
    left = pl.DataFrame({"id": values})
    right = pl.DataFrame({"id": known}).with_row_index("place")
    return left.join(right, on="id", how="left", maintain_order="left")["place"]


def _ids(path: Path, frame: pl.DataFrame, column: str, encoding: str) -> pl.Series:
    values = frame[column]
    if values.dtype.is_float():  # what pandas makes of whole numbers with a gap
        values = values.cast(pl.Int64, strict=False)
    values = values.cast(pl.String).str.strip_chars()
    _reject(path, values.is_null() | (values == "").fill_null(True), values, column, "is empty", encoding)
    return values


def _times(path: Path, frame: pl.DataFrame, source: TableSource) -> np.ndarray:
    values = frame[source.timestamp]
    if source.timestamp_unit == "iso":
        if values.dtype == pl.String:
            # Without a zone a time is taken as UTC; mixed forms of one column are an error, not a guess.
            parsed = values.str.strip_chars().str.to_datetime(strict=False, time_unit="us", time_zone="UTC")
        else:
            parsed = values.cast(pl.Datetime("us"), strict=False)
        numbers = parsed.to_physical()
        problem = "is no ISO date and time"
    else:
        if values.dtype == pl.String:
            values = values.str.strip_chars()
        numbers = values.cast(pl.Int64, strict=False)
        as_float = values.cast(pl.Float64, strict=False)
        numbers = numbers.fill_null(
            pl.select(pl.when(as_float == as_float.floor()).then(as_float)).to_series().cast(pl.Int64, strict=False)
        )
        problem = f"is no whole number; source.timestamp_unit is {source.timestamp_unit}"
    _reject(path, numbers.is_null(), frame[source.timestamp], source.timestamp, problem, source.encoding)
    return numbers.to_numpy().astype(np.int64)


def _reject(path: Path, wrong: pl.Series, values: pl.Series, column: str, problem: str, encoding: str) -> None:
    """Raise for the first row that is wrong, with its line in a CSV file or its row in a Parquet file."""
    rows = wrong.arg_true()
    if len(rows):
        row = int(rows[0])
        more = f" ({len(rows)} rows in all)" if len(rows) > 1 else ""
        raise InputError(f"{path}: {_where(path, row, encoding)}: {column} {values[row]!r} {problem}{more}")


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


def _read_columns(path: Path, columns: list[str], encoding: str) -> pl.DataFrame:
    """The named columns; text as text, nothing guessed."""
    if not path.is_file():
        raise InputError(f"{path}: not found; source.events and source.items are relative to --raw")
    if path.suffix not in (".csv", ".tsv", ".parquet"):
        raise InputError(f"{path}: unknown ending; expected .csv, .tsv or .parquet")
    try:
        if path.suffix == ".parquet":
            found = pq.read_schema(path).names
            _require_columns(path, columns, found)
            frame = pl.from_arrow(pq.read_table(path, columns=columns))
        else:
            found = _header(path, encoding)
            _require_columns(path, columns, found)
            frame = pl.from_arrow(_read_csv(path, columns, found, encoding))
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError, UnicodeError, LookupError) as error:
        raise InputError(f"{path}: {_explain(path, str(error), encoding)}") from None
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


def _read_csv(path: Path, columns: list[str], found: list[str], encoding: str) -> pa.Table:
    return pyarrow.csv.read_csv(
        path,
        # One thread: only then does an error name its row.
        read_options=pyarrow.csv.ReadOptions(use_threads=False, encoding=encoding),
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
