"""The dataset folder: round trip, equal bytes, and every kind of damage named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llara_dist.data.candidates import draw_candidates
from llara_dist.data.dataset import Rows, load_dataset, row_exclusions, touched_items, write_dataset
from llara_dist.data.log import Log
from llara_dist.errors import InputError
from llara_dist.integrity import sha256_file, sha256_json


def _rows(first: int, users: list[int], histories: list[list[int]], targets: list[int]) -> Rows:
    return Rows(
        keys=np.arange(first, first + len(targets), dtype=np.uint64),
        users=np.array(users, np.int32),
        offsets=np.cumsum([0, *map(len, histories)]).astype(np.int64),
        items=np.array([item for history in histories for item in history], np.int32),
        targets=np.array(targets, np.int32),
    )


def _write(out: Path, **changes) -> dict:
    log = Log(
        users=np.array([0, 0, 0, 1, 1, 1], np.int32),
        items=np.array([0, 1, 2, 3, 4, 30], np.int32),
        timestamps=np.arange(6),
        titles=[f"Title {item}" for item in range(40)],
        domain="movie",
        used=np.array([True] * 5 + [False]),
    )
    splits = {
        "train": _rows(0, [0, 0], [[0], [0, 1]], [1, 2]),
        "val": _rows(2, [1], [[3]], [4]),
        "test": _rows(3, [-1], [[3, 4]], [5]),
    }
    touched = touched_items(log.users, log.items, log.num_items)
    candidates = {
        name: draw_candidates(
            splits[name].keys, splits[name].targets, *row_exclusions(splits[name], *touched, 0, 1), 40, 20, 0, 0
        )
        for name in ("val", "test")
    }
    given = {
        "name": "tiny",
        "log": log,
        "splits": splits,
        "candidates": candidates,
        "recipe": {"name": "tiny"},
        "max_history": 10,
        "min_history": 1,
        "counts": {"windows": 3},
        "audit": {},
        "notes": ["made by hand"],
    }
    return write_dataset(out, **(given | changes))


def test_round_trip(tmp_path: Path) -> None:
    info = _write(tmp_path / "data")
    data = load_dataset(tmp_path / "data")
    assert data.info == info
    assert data.hash == info["hash"]
    assert (data.num_items, data.domain, data.max_history, data.num_candidates) == (40, "movie", 10, 20)
    assert data.titles[7] == "Title 7"
    assert info["counts"] == {"items": 40, "interactions": 6, "train": 2, "val": 1, "test": 1, "windows": 3}
    assert data.train.keys.tolist() == [0, 1]
    assert data.train.history(1).tolist() == [0, 1]
    assert data.train.targets.tolist() == [1, 2]
    assert data.test.users.tolist() == [-1]
    assert data.rows("val") is data.val
    assert data.candidates["val"].shape == (1, 20)
    assert pq.read_table(tmp_path / "data" / "test.parquet")["user"].null_count == 1
    with pytest.raises(InputError, match="split 'dev'"):
        data.rows("dev")


def test_exclusions_hold_all_the_user_ever_touched(tmp_path: Path) -> None:
    _write(tmp_path / "data")
    data = load_dataset(tmp_path / "data")
    offsets, items = data.exclusions("train")
    assert [sorted(set(part.tolist())) for part in np.split(items, offsets[1:-1])] == [[0, 1, 2], [0, 1, 2]]
    offsets, items = data.exclusions("train", 1)
    assert offsets[-1] == len(items)
    assert set(items.tolist()) == {0, 1, 2}
    assert set(data.exclusions("val")[1].tolist()) == {3, 4, 30}  # 30 made no sequence
    assert set(data.exclusions("test")[1].tolist()) == {3, 4, 5}  # no user: window and target


def test_no_users_at_all(tmp_path: Path) -> None:
    log = Log(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64), [f"t{i}" for i in range(40)], "game")
    _write(tmp_path / "data", log=log)
    offsets, items = load_dataset(tmp_path / "data").exclusions("train")
    assert [sorted(part.tolist()) for part in np.split(items, offsets[1:-1])] == [[0, 1], [0, 1, 2]]


def test_same_content_same_bytes(tmp_path: Path) -> None:
    one, two = _write(tmp_path / "one"), _write(tmp_path / "two")
    assert one == two
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_existing_folder_is_kept(tmp_path: Path) -> None:
    _write(tmp_path / "data")
    before = sha256_file(tmp_path / "data" / "dataset.json")
    with pytest.raises(InputError, match="exists already"):
        _write(tmp_path / "data", name="other")
    assert sha256_file(tmp_path / "data" / "dataset.json") == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        _write(tmp_path / "data", notes=[object()])
    assert list(tmp_path.iterdir()) == []


def _expect(folder: Path, *parts: str, verify: bool = True) -> None:
    with pytest.raises(InputError) as caught:
        load_dataset(folder, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(folder), *parts):
        assert part in message


@pytest.mark.parametrize("file", ["items.parquet", "val.parquet", "candidates.parquet", "dataset.json"])
def test_missing_file(tmp_path: Path, file: str) -> None:
    _write(tmp_path / "data")
    (tmp_path / "data" / file).unlink()
    _expect(tmp_path / "data", file, "not found")
    _expect(tmp_path / "data", file, "not found", verify=False)


@pytest.mark.parametrize("where", [4, -20, 200])
def test_flipped_byte(tmp_path: Path, where: int) -> None:
    _write(tmp_path / "data")
    path = tmp_path / "data" / "train.parquet"
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    _expect(tmp_path / "data", "train.parquet", "sha256")


def test_truncated_file_without_verification(tmp_path: Path) -> None:
    _write(tmp_path / "data")
    path = tmp_path / "data" / "train.parquet"
    path.write_bytes(path.read_bytes()[:50])
    _expect(tmp_path / "data", "train.parquet", "not a readable Parquet file", verify=False)


def test_dataset_json_damage(tmp_path: Path) -> None:
    info = _write(tmp_path / "data")
    path = tmp_path / "data" / "dataset.json"
    for change, parts in (
        ({"format_version": 99}, ("format_version 99",)),
        ({"hash": "0" * 64}, ("'hash'",)),
        ({"files": {}}, ("sha256",)),
        ({"max_history": "ten"}, ("'max_history' is 'ten', no int",)),
        ({"domain": "book"}, ("domain 'book'", "movie, game, artist")),
    ):
        path.write_text(json.dumps(info | change))
        _expect(tmp_path / "data", *parts)
    path.write_text(json.dumps({key: value for key, value in info.items() if key != "max_history"}))
    _expect(tmp_path / "data", "'max_history'")
    path.write_text("{")
    _expect(tmp_path / "data", "not JSON")


def _rewrite(folder: Path, file: str, column: str, values: pa.Array) -> None:
    """Change a column and make the hashes right again, as a careless tool would."""
    table = pq.read_table(folder / file)
    table = table.set_column(table.column_names.index(column), column, values)
    pq.write_table(table, folder / file)
    info = json.loads((folder / "dataset.json").read_text())
    info["files"][file] = sha256_file(folder / file)
    info["hash"] = sha256_json(info["files"])
    (folder / "dataset.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("file", "column", "values", "parts"),
    [
        ("train.parquet", "target", pa.array([1, 40], pa.int32()), ("target 40", "0..39")),
        ("train.parquet", "history", pa.array([[0], [-1, 1]], pa.list_(pa.int32())), ("history -1",)),
        (
            "train.parquet",
            "history",
            pa.array([[0], []], pa.list_(pa.int32())),
            ("row 1 has 0 history items", "1 to 10"),
        ),
        ("train.parquet", "history", pa.array([[0], [1] * 11], pa.list_(pa.int32())), ("row 1 has 11 history items",)),
        ("train.parquet", "history", pa.array([[0], None], pa.list_(pa.int32())), ("history", "null")),
        ("train.parquet", "target", pa.array([1, None], pa.int32()), ("target", "null")),
        ("train.parquet", "key", pa.array([0, 7], pa.uint64()), ("row 1 has key 7", "expected 1")),
        ("train.parquet", "key", pa.array([0, 1], pa.int64()), ("'key' is int64", "expected uint64")),
        ("items.parquet", "item_id", pa.array([1, *range(1, 40)], pa.int32()), ("item_id",)),
        ("items.parquet", "title", pa.array(["", *map(str, range(39))]), ("title", "item 0")),
        ("interactions.parquet", "item", pa.array([0, 1, 2, 3, 4, 77], pa.int32()), ("item 77",)),
        ("interactions.parquet", "user", pa.array([0, 0, 0, 1, 1, -1], pa.int32()), ("user -1",)),
        ("candidates.parquet", "key", pa.array([2, 9], pa.uint64()), ("keys",)),
        ("candidates.parquet", "candidates", pa.array([list(range(20)), [1]], pa.list_(pa.int32())), ("row 1",)),
        (
            "candidates.parquet",
            "candidates",
            pa.array([list(range(20)), list(range(10, 30))], pa.list_(pa.int32())),
            ("row 1", "its target"),
        ),
    ],
)
def test_wrong_content(tmp_path: Path, file: str, column: str, values: pa.Array, parts: tuple[str, ...]) -> None:
    _write(tmp_path / "data")
    _rewrite(tmp_path / "data", file, column, values)
    _expect(tmp_path / "data", file, *parts)


def test_log_columns_must_match() -> None:
    log = Log(np.zeros(2, np.int32), np.zeros(2, np.int32), np.zeros(2, np.int64), ["a"], "movie")
    with pytest.raises(AssertionError, match="lengths"):
        replace(log, timestamps=np.zeros(3, np.int64))
