"""CSV and Parquet logs: what is read, and that each wrong row is named with its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from llara_dist.data import tables
from llara_dist.data.dataset import load_dataset
from llara_dist.data.prepare import prepare
from llara_dist.data.tables import TableSource, read_tables
from llara_dist.errors import InputError

ITEMS = "item,title\na,First\nb,Second\nc,Third\n"
EVENTS = "user,item,timestamp,rating\nx,a,10,5\ny,b,11,2.5\nx,c,12,4\n"


def _source(**changes) -> TableSource:
    return TableSource(**({"kind": "table", "events": "events.csv", "items": "items.csv"} | changes))


def _write(folder: Path, events: str | bytes = EVENTS, items: str | bytes = ITEMS) -> Path:
    for name, text in (("events.csv", events), ("items.csv", items)):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_reads_csv(tmp_path: Path) -> None:
    log, counts = read_tables(_write(tmp_path), _source(rating="rating", min_rating=4), "movie")
    assert log.users.tolist() == [0, 1, 0]
    assert log.items.tolist() == [0, 1, 2]
    assert log.timestamps.tolist() == [10, 11, 12]
    assert log.used is not None
    assert log.used.tolist() == [True, False, True]
    assert log.titles == ["First", "Second", "Third"]
    assert (log.item_ids, log.user_ids) == (["a", "b", "c"], ["x", "y"])
    assert counts == {"events_of_unknown_items_dropped": 0}


def test_column_names_byte_order_mark_quotes_and_blank_lines(tmp_path: Path) -> None:
    events = '\ufeffwhen,who,what,note\r\n10,u1, a ,"x,\ny"\r\n\r\n11,u1,b,\r\n'
    items = 'what,name\na,"The ""A"", a story"\nb,\n'
    source = _source(user="who", item="what", timestamp="when", item_id="what", title="name")
    log, _ = read_tables(_write(tmp_path, events, items), source, "movie")
    assert log.items.tolist() == [0, 1]
    assert log.titles == ['The "A", a story', ""]


def test_tabs_and_latin_1(tmp_path: Path) -> None:
    (tmp_path / "events.tsv").write_text("user\titem\ttimestamp\n1\t1\t5\n")
    (tmp_path / "items.tsv").write_bytes("item\ttitle\n1\tC\xe9r\xe9monie, La\n".encode("latin-1"))
    source = _source(events="events.tsv", items="items.tsv", encoding="latin-1")
    assert read_tables(tmp_path, source, "movie")[0].titles == ["Cérémonie, La"]


def test_parquet_with_dates_and_float_ids(tmp_path: Path) -> None:
    pl.DataFrame(
        {"user": [7, 7], "item": [2.0, 1.0], "timestamp": ["2024-01-01 00:00:00", "2024-01-01 00:00:01"]}
    ).with_columns(pl.col("timestamp").str.to_datetime()).write_parquet(tmp_path / "events.parquet")
    pl.DataFrame({"item": [1, 2], "title": ["One", None]}).write_parquet(tmp_path / "items.parquet")
    source = _source(events="events.parquet", items="items.parquet", timestamp_unit="iso")
    log, _ = read_tables(tmp_path, source, "movie")
    assert log.items.tolist() == [1, 0]
    assert log.titles == ["One", ""]
    assert log.timestamps.tolist() == [1704067200000000, 1704067201000000]
    assert log.timestamp_unit == "us"


def test_iso_text_and_whole_floats(tmp_path: Path) -> None:
    iso = "user,item,timestamp\nx,a,2024-01-01T00:00:00\nx,b,2024-01-01T00:00:02\n"
    log, _ = read_tables(_write(tmp_path, iso), _source(timestamp_unit="iso"), "movie")
    assert np.diff(log.timestamps).tolist() == [2_000_000]
    floats = "user,item,timestamp\nx,a,1704067200.0\nx,b,1704067201\n"
    log, _ = read_tables(_write(tmp_path, floats), _source(timestamp_unit="ms"), "movie")
    assert (log.timestamps.tolist(), log.timestamp_unit) == ([1704067200, 1704067201], "ms")


def test_unknown_items_may_be_dropped(tmp_path: Path) -> None:
    events = EVENTS + "z,nope,13,5\nx,b,14,5\n"
    log, counts = read_tables(_write(tmp_path, events), _source(unknown_items="drop"), "movie")
    assert log.items.tolist() == [0, 1, 2, 1]
    assert log.timestamps.tolist() == [10, 11, 12, 14]
    assert counts == {"events_of_unknown_items_dropped": 1}


@pytest.mark.parametrize(
    ("events", "parts"),
    [
        ("user,item,timestamp\nx,a,10\nx,nope,11\n", ("line 3", "'nope'", "is not in items.csv")),
        ('user,item,timestamp\n"x\n",a,10\n\nx,nope,11\n', ("line 5", "'nope'")),
        ("user,item,timestamp\nx,a,10\nx,a,soon\n", ("line 3", "'soon'", "whole number", "timestamp_unit is s")),
        ("user,item,timestamp\nx,a,1.5\n", ("line 2", "'1.5'", "whole number")),
        ("user,item,timestamp\nx,a,\n", ("line 2", "timestamp None")),
        ("user,item,timestamp\nx,a,10\n,a,10\n,a,10\n", ("line 3", "user", "is empty", "2 rows in all")),
        ("user,item,timestamp\nx, ,10\n", ("line 2", "item", "is empty")),
        ("user,item,timestamp\nx,a,10\nx,a\n", ("line 3", "Expected 3 columns, got 2")),
        ("user,item,timestamp\nx,a,10\n\nx,a,10,7\n", ("line 4", "Expected 3 columns, got 4")),
        (b"user,item,timestamp\nx,a,10\nx\xe9,a,11\n", ("line 3", "UTF8", "source.encoding")),
        ("user,item\nx,a\n", ("'timestamp' is missing", "user, item")),
        ("user,item,timestamp,user\nx,a,1,y\n", ("'user' is there twice",)),
        ("user,item,timestamp\n", ("holds no event",)),
        ("", ("'user' is missing",)),
        ("user,item,timestamp\nx,a,99999999999999999999\n", ("line 2", "whole number")),
    ],
)
def test_bad_events(tmp_path: Path, events: str | bytes, parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        read_tables(_write(tmp_path, events), _source(), "movie")
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(tmp_path / "events.csv"), *parts):
        assert part in message


def test_wrong_rows_are_counted_over_all_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_BATCH_BYTES", 64)
    good = "x,a,10,5\n" * 20
    with pytest.raises(InputError, match=r"line 22: timestamp 'soon' is no whole number; .* \(3 rows in all\)"):
        read_tables(_write(tmp_path, EVENTS[:28] + good + f"x,a,soon,1\n{good}" * 3 + ",a,1,1\n"), _source(), "movie")
    with pytest.raises(InputError, match=r"line 43: Expected 4 columns, got 2"):
        read_tables(_write(tmp_path, EVENTS[:28] + good + f"x,a,soon,1\n{good}x,a\n"), _source(), "movie")
    events = EVENTS[:28].encode() + f"{good}x,a,1,1\n{good}".encode() + b"\xe9,a,1,1\n"
    with pytest.raises(InputError, match=r"line 43: .*UTF8"):
        read_tables(_write(tmp_path, events), _source(), "movie")


def test_times_have_one_form_over_all_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_BATCH_BYTES", 64)
    rows = "x,a,2024-01-01 00:00:00\n" * 20 + "x,a,01/02/2024 00:00:00\n" * 20
    with pytest.raises(InputError, match=r"line 22: .* is no ISO date and time \(20 rows in all\)"):
        read_tables(_write(tmp_path, "user,item,timestamp\n" + rows), _source(timestamp_unit="iso"), "movie")


@pytest.mark.parametrize(
    ("items", "parts"),
    [
        ("item,title\na,First\nb,Second\nc,Third\na,Fourth\n", ("line 5", "'a'", "listed twice")),
        ("item,title\n,First\n", ("line 2", "is empty")),
        ("id,title\na,First\n", ("'item' is missing; found id, title",)),
    ],
)
def test_bad_items(tmp_path: Path, items: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        read_tables(_write(tmp_path, items=items), _source(), "movie")
    for part in (str(tmp_path / "items.csv"), *parts):
        assert part in str(caught.value)


def test_bad_ratings_files_and_parquet_rows(tmp_path: Path) -> None:
    _write(tmp_path, EVENTS.replace("2.5", "good"))
    with pytest.raises(InputError, match=r"events\.csv: line 3: rating 'good' is no number"):
        read_tables(tmp_path, _source(rating="rating", min_rating=4), "movie")
    with pytest.raises(InputError, match=r"nope\.csv: not found"):
        read_tables(tmp_path, _source(events="nope.csv"), "movie")
    (tmp_path / "events.xls").write_text("")
    with pytest.raises(InputError, match="unknown ending"):
        read_tables(tmp_path, _source(events="events.xls"), "movie")
    (tmp_path / "events.parquet").write_text("no parquet")
    with pytest.raises(InputError, match=r"events\.parquet: .*Parquet"):
        read_tables(tmp_path, _source(events="events.parquet"), "movie")
    pl.DataFrame({"user": [1, 1], "item": ["a", "q"], "timestamp": [1, 2]}).write_parquet(tmp_path / "events.parquet")
    with pytest.raises(InputError, match=r"events\.parquet: row 1: item 'q' is not in items\.csv"):
        read_tables(tmp_path, _source(events="events.parquet"), "movie")
    with pytest.raises(InputError, match="encoding"):
        read_tables(tmp_path, _source(encoding="klingon"), "movie")
    with pytest.raises(InputError, match=r"source\.rating does not name"):
        _source(min_rating=4)


def test_csv_example_recipe_end_to_end(tmp_path: Path) -> None:
    """The built-in example on a made-up log in its layout; a fresh run gives the same bytes."""
    rng = np.random.default_rng(1)
    raw = tmp_path / "raw"
    raw.mkdir()
    n = 4000
    pl.DataFrame(
        {
            "userId": rng.integers(1, 81, n),
            "movieId": rng.integers(100, 180, n),
            "rating": rng.integers(1, 11, n) / 2,
            "timestamp": rng.integers(10**9, 2 * 10**9, n),
        }
    ).write_csv(raw / "ratings.csv")
    titles = [f"Film {item // 2}, The ({1950 + item % 2})" for item in range(90)]
    pl.DataFrame({"movieId": range(100, 190), "title": titles, "genres": [""] * 90}).write_csv(raw / "movies.csv")
    result = prepare("csv_example", tmp_path / "one", raw)
    data = load_dataset(tmp_path / "one")
    assert data.num_items == 80  # ten items have no events
    assert result["counts"]["items_left_out"] == 10
    assert data.titles[:2] == ["The Film 0 (1950)", "The Film 0 (1951)"]
    # Leave-last-out shares users between the splits by design, and the audit says how many.
    shared_users = len(np.intersect1d(data.train.users, data.test.users))
    assert data.info["audit"]["leakage"]["train/test"]["users_in_both"] == shared_users > 70
    offsets, items = data.exclusions("test")
    for row, shown in enumerate(data.candidates["test"].tolist()):
        excluded = set(items[offsets[row] : offsets[row + 1]].tolist()) - {int(data.test.targets[row])}
        assert not excluded & set(shown)
    prepare("csv_example", tmp_path / "two", raw)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
