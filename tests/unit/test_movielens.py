"""Raw MovieLens files: what is read, and that each wrong line is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from llara_dist.data.movielens import read_movielens
from llara_dist.data.prepare import prepare
from llara_dist.errors import InputError

ITEMS = "1|Toy Story (1995)|01-Jan-1995\n2|Mis\xe9rables, Les (1995)|x\n3|unknown||\n"
EVENTS = "5\t1\t3\t100\n5\t2\t2\t101\n6\t3\t5\t102\n"


def _write(folder: Path, events: str = EVENTS, items: str = ITEMS) -> Path:
    (folder / "u.data").write_text(events)
    (folder / "u.item").write_bytes(items.encode("latin-1"))
    return folder


def test_reads(tmp_path: Path) -> None:
    log = read_movielens(_write(tmp_path), min_rating=3, drop_first_line=True)
    assert log.users.tolist() == [0, 0, 1]
    assert log.user_ids == ["5", "6"]
    assert log.items.tolist() == [0, 1, 2]
    assert log.timestamps.tolist() == [100, 101, 102]
    assert log.used is not None
    assert log.used.tolist() == [False, False, True]
    assert log.titles == ["Toy Story (1995)", "Misérables, Les (1995)", "unknown"]
    assert log.item_ids == ["1", "2", "3"]
    every = read_movielens(tmp_path, min_rating=1, drop_first_line=False).used
    assert every is not None
    assert every.all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"events": EVENTS + "5\t1\t3\n"}, r"u\.data: line 4: expected four tab-separated whole numbers"),
        ({"events": EVENTS + "5\t1\t3\t1\t1\n"}, r"u\.data: line 4: expected four"),
        ({"events": "user\titem\trating\ttimestamp\n" + EVENTS}, r"u\.data: line 1: expected four .* found 'user"),
        ({"events": EVENTS.replace("101", "1e3")}, r"u\.data: line 2: expected four"),
        ({"events": EVENTS + "\n"}, r"u\.data: line 4: expected four"),
        ({"events": EVENTS + "5\t4\t3\t1\n"}, r"u\.data: line 4: item 4 is not in u\.item"),
        ({"events": EVENTS + "5\t0\t3\t1\n"}, r"u\.data: line 4: item 0 is not in u\.item"),
        ({"events": EVENTS + "0\t1\t3\t1\n"}, r"u\.data: line 4: user 0 is not"),
        ({"events": ""}, r"u\.data: is empty"),
        ({"items": ITEMS + "5|Five\n"}, r"u\.item: line 4: expected '4\|title\|…', found '5\|Five'"),
        ({"items": "1 Toy Story\n"}, r"u\.item: line 1"),
        ({"items": ""}, r"u\.item: is empty"),
    ],
)
def test_wrong_lines_stop_prepare(tmp_path: Path, change: dict[str, str], message: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    with pytest.raises(InputError, match=message) as caught:
        prepare("movielens", tmp_path / "out", _write(raw, **change))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [raw]


def test_missing_file(tmp_path: Path) -> None:
    (_write(tmp_path) / "u.item").unlink()
    with pytest.raises(InputError, match=r"u\.item: not found"):
        prepare("movielens", tmp_path / "out", tmp_path)
