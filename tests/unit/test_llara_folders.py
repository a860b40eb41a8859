"""LLaRA's own folders, made small by hand and with one thing wrong at a time."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from llara_dist.data import llara_folders
from llara_dist.data.dataset import load_dataset
from llara_dist.data.llara_folders import read_id2name, read_llara
from llara_dist.data.prepare import prepare
from llara_dist.errors import InputError

FRAMES = Path(__file__).parent / "frames"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve items, six rows a split; pairs in train as on MovieLens, plain ids elsewhere."""
    raw = tmp_path / "raw"
    raw.mkdir()
    shutil.copy(FRAMES / "pandas1_pairs.df", raw / "train_data.df")
    shutil.copy(FRAMES / "pandas2.df", raw / "Val_data.df")
    shutil.copy(FRAMES / "pandas3.df", raw / "Test_data.df")
    (raw / "id2name.txt").write_text("".join(f"{item}::Game {item}\n" for item in range(12)))
    return raw


def test_reads_all_three(folder: Path) -> None:
    log, splits, counts = read_llara(folder, "game", min_history=3, max_history=10)
    assert log.titles[11] == "Game 11"
    assert len(log) == 0
    assert counts == {"train_windows": 6, "train_dropped_short": 0, "val_dropped_short": 0, "test_dropped_short": 0}
    for first, rows in zip((0, 6, 12), splits.values(), strict=True):
        assert rows.keys.tolist() == list(range(first, first + 6))
        assert (rows.users == -1).all()
        assert rows.history(2).tolist() == [2, 6, 10]
        assert rows.targets[2] == 9
    _, shorter, _ = read_llara(folder, "game", min_history=1, max_history=2)
    assert shorter["val"].history(2).tolist() == [6, 10]  # the newest are kept


def test_history_shorter_than_allowed(folder: Path) -> None:
    with pytest.raises(InputError, match=r"train_data\.df: no row has at least min_history = 4"):
        read_llara(folder, "game", min_history=4, max_history=10)


def _frame(monkeypatch: pytest.MonkeyPatch, **columns: list) -> None:
    frame = {"seq": [[1, 2, 12, 12], [3, 12, 12, 12]], "len_seq": [2, 1], "next": [5, 6]} | columns
    arrays = {}
    for name, values in frame.items():
        arrays[name] = np.empty(len(values), dtype=object)
        arrays[name][:] = [values[0], *values[1:]] if not isinstance(values[0], list) else None
        for row, value in enumerate(values):
            arrays[name][row] = value
    monkeypatch.setattr(llara_folders, "read_frame", lambda path: arrays)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"seq": [[1, 2, 12, 12], [3, 12, 13, 12]]}, "row 1: an item id is not in 0..11"),
        ({"next": [5, 12]}, "row 1: an item id is not in 0..11"),
        ({"seq": [[1, 2, 12, 12], [12, 3, 12, 12]]}, "row 1: len_seq is 1 but seq holds 1 items before its padding"),
        ({"len_seq": [2, 3]}, "row 1: len_seq is 3 but seq holds 1"),
        (
            {"seq": [[1, 2, 12, 12], [3, 12, 12]]},
            r"row 1: seq is '\[3, 12, 12\]', expected a list of item ids, as long",
        ),
        ({"seq": [[1, 2, 12, 12], "abcd"]}, "row 1: seq is 'abcd'"),
        ({"seq": [[1, 2, 12, 12], [3, "4", 12, 12]]}, "row 1: seq"),
        ({"next": [5, 1.5]}, "row 1: next is '1.5', expected a whole number"),
        ({"next": [5, None]}, "row 1: next is 'None'"),
    ],
)
def test_inconsistent_rows(folder: Path, monkeypatch: pytest.MonkeyPatch, columns: dict, message: str) -> None:
    _frame(monkeypatch, **columns)
    with pytest.raises(InputError, match=rf"train_data\.df: {message}"):
        read_llara(folder, "game", 1, 10)


def test_empty_history_has_stated_length_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _frame(monkeypatch, seq=[[12, 12, 12, 12], [3, 12, 12, 12]], len_seq=[1, 1])
    _, splits, counts = read_llara(folder, "game", 1, 10)
    assert len(splits["train"]) == 1
    assert counts["train_dropped_short"] == 1


def test_missing_column(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llara_folders, "read_frame", lambda path: {"seq": np.zeros(1), "next": np.zeros(1)})
    with pytest.raises(InputError, match="column 'len_seq' is missing; found seq, next"):
        read_llara(folder, "game", 1, 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"0::a\nb\n", "line 2: expected 'id::title', found 'b'"),
        (b"0::a\nx::b\n", "line 2: expected 'id::title'"),
        (b"0::a\n0::b\n", "line 2: item 0 is listed twice"),
        (b"0::a\n2::b\n", "item 1 is not listed"),
        (b"0::a\n1::caf\xe9\n", "line 2: not UTF-8"),
        (b"", "line 1: expected"),
    ],
)
def test_title_lists(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "id2name.txt").write_bytes(text)
    with pytest.raises(InputError, match=message):
        read_id2name(tmp_path / "id2name.txt")


def test_title_lists_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "id2name.txt").write_bytes("1::b::c\u2028d\r\n0::\n\n".encode())
    assert read_id2name(tmp_path / "id2name.txt") == ["", "b::c\u2028d"]


def test_no_titles(folder: Path) -> None:
    (folder / "id2name.txt").unlink()
    with pytest.raises(InputError, match=r"neither id2name\.txt"):
        read_llara(folder, "game", 3, 10)


def test_prepare_says_what_is_not_known(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "few.yaml"
    recipe.write_text("{name: few, domain: game, source: {kind: llara}, candidates: {count: 5}}")
    result = prepare(str(recipe), tmp_path / "out", folder)
    data = load_dataset(tmp_path / "out")
    assert data.hash == result["hash"]
    assert (data.test.users == -1).all()
    assert len(data.interactions[0]) == 0
    assert any("stores no users" in note and "user is null" in note for note in data.info["notes"])
    for row, shown in enumerate(data.candidates["test"].tolist()):
        assert not set(shown) & set(data.test.history(row).tolist()) - {int(data.test.targets[row])}
    assert data.info["audit"]["leakage"]["train/test"]["users_in_both"] is None
    assert "stores no users" in capsys.readouterr().out


def test_unsafe_pickle_stops_prepare(folder: Path, tmp_path: Path) -> None:
    import os

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'proof'}",)

    (folder / "Test_data.df").write_bytes(pickle.dumps(Attack()))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"Test_data\.df: refused, the pickle asks for '(posix|nt)\.system'"):
        prepare("steam", tmp_path / "out", folder)
    assert sorted(tmp_path.iterdir()) == before  # neither the proof nor anything half-written
