"""`prepare` on the real MovieLens-100K and on LLaRA's published folders, against each other and against Table 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llara_dist.data.dataset import Dataset, Rows, load_dataset
from llara_dist.data.movielens import read_movielens
from llara_dist.data.prepare import prepare
from llara_dist.data.titles import title_key
from llara_dist.errors import InputError
from llara_dist.integrity import sha256_file


@pytest.fixture(scope="module")
def folders(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("prepared")
    for name, recipe, raw in (
        ("raw", "movielens", "ml-100k"),
        ("movielens", "movielens", "llara-movielens"),
        ("steam", "steam", "llara-steam"),
    ):
        prepare(recipe, out / name, shared / "data" / raw)
    return {name: out / name for name in ("raw", "movielens", "steam")}


@pytest.fixture(scope="module")
def data(folders: dict[str, Path]) -> dict[str, Dataset]:
    return {name: load_dataset(path) for name, path in folders.items()}


@pytest.mark.parametrize(
    ("name", "windows", "rows", "items"),
    [
        ("raw", 68_388, (66_126, 94, 95), 1_682),
        ("movielens", 68_388, (66_126, 94, 95), 1_682),
        ("steam", 1_000, (1_000, 1_184, 1_186), 3_581),  # of Steam's training rows 1,000 are at hand
    ],
)
def test_counts(data: dict[str, Dataset], name: str, windows: int, rows: tuple[int, ...], items: int) -> None:
    found = data[name]
    assert found.info["counts"]["train_windows"] == windows
    assert tuple(len(found.rows(split)) for split in ("train", "val", "test")) == rows
    assert found.num_items == items
    assert found.num_candidates == 20


def test_titles_are_unique_and_right(data: dict[str, Dataset]) -> None:
    for found in data.values():
        assert len({title_key(title) for title in found.titles}) == found.num_items
    films = data["raw"].titles
    assert films == data["movielens"].titles
    assert films[0] == "Toy Story"
    assert films[266] == "Unknown movie 267"
    assert films[49] == "Star Wars"
    expected = {
        "An American in Paris", "Les Misérables", "Das Boot", "L'Enfer", "The Tin Drum (Die Blechtrommel)",
        "La Double vie de Véronique (The Double Life of Veronique)", "Sabrina (1954)", "Sabrina (1995)",
        "Money Talks", "Money Talks (2)", "Truth or Consequences, N.M.", "Nénette et Boni",
    }  # fmt: skip
    assert expected <= set(films)
    assert not any(title.endswith((", The", ", A", ", An", ", La", ", Le", ", Les", ", Der")) for title in films)
    found = data["raw"].info["audit"]["titles"]
    assert (found["collisions"], found["colliding_groups"], found["empty_or_unknown"]) == (45, 22, 1)
    assert found["told_apart_by_year"] + found["told_apart_by_number"] == 29


def _windows(rows: Rows) -> list[tuple[list[int], int]]:
    return [(rows.history(row).tolist(), int(rows.targets[row])) for row in range(len(rows))]


def test_published_train_users_and_targets(shared: Path, data: dict[str, Dataset]) -> None:
    """Per user the same targets; each that stands at another place shares its second with the one there."""
    log = read_movielens(shared / "data" / "ml-100k", 3, True)
    time_of = dict(zip(zip(log.users.tolist(), log.items.tolist(), strict=True), log.timestamps.tolist(), strict=True))
    ours, published = data["raw"].train, data["movielens"].train
    starts = np.flatnonzero(ours.lengths == 3)
    by_targets = {}
    for start, stop in zip(starts, np.append(starts[1:], len(ours)), strict=True):
        whole = [*ours.history(start).tolist(), *ours.targets[start:stop].tolist()]
        by_targets[frozenset(whole)] = (int(ours.users[start]), whole)
    starts = np.flatnonzero(published.lengths == 3)
    assert len(by_targets) == len(starts) == 754
    differing = 0
    for start, stop in zip(starts, np.append(starts[1:], len(published)), strict=True):
        whole = [*published.history(start).tolist(), *published.targets[start:stop].tolist()]
        user, mine = by_targets.pop(frozenset(whole))
        other = [(a, b) for a, b in zip(mine, whole, strict=True) if a != b]
        assert all(time_of[user, a] == time_of[user, b] for a, b in other)
        differing += len(other)
    assert not by_targets
    # Of 68,388 events of train users; all of them within ties, whose published order the data does not give.
    assert differing == 32_060


@pytest.mark.parametrize(("split", "differing"), [("val", 25), ("test", 25)])
def test_published_evaluation_rows(shared: Path, data: dict[str, Dataset], split: str, differing: int) -> None:
    log = read_movielens(shared / "data" / "ml-100k", 3, True)
    used = log.used
    ours = data["raw"].rows(split)
    events = {}
    for user in ours.users.tolist():
        mine = np.flatnonzero(used & (log.users == user))
        events[user] = dict(zip(log.items[mine].tolist(), log.timestamps[mine].tolist(), strict=True))
    target_of = dict(zip(ours.users.tolist(), ours.targets.tolist(), strict=True))
    matched, other = set(), 0
    for history, target in _windows(data["movielens"].rows(split)):
        # The published row's user: all its items are theirs, and none of their other events is later than the oldest.
        candidates = [
            user
            for user, times in events.items()
            if {*history, target} <= times.keys()
            and sum(time > times[history[0]] for item, time in times.items() if item not in {*history, target}) == 0
        ]
        assert len(candidates) == 1
        user = candidates[0]
        matched.add(user)
        if target != target_of[user]:
            assert events[user][target] == events[user][target_of[user]] == max(events[user].values())
            other += 1
    assert len(matched) == len(ours)
    assert other == differing


def test_candidates_leave_out_all_the_user_rated(shared: Path, data: dict[str, Dataset]) -> None:
    every = read_movielens(shared / "data" / "ml-100k", 0, False)
    for split in ("val", "test"):
        rows = data["raw"].rows(split)
        for row, shown in enumerate(data["raw"].candidates[split].tolist()):
            rated = set(every.items[every.users == rows.users[row]].tolist())
            assert rated & set(shown) == {int(rows.targets[row])}
            assert len(set(shown)) == 20
    places = [
        int(np.flatnonzero(shown == target)[0])
        for split in ("val", "test")
        for shown, target in zip(data["steam"].candidates[split], data["steam"].rows(split).targets, strict=True)
    ]
    counts = np.bincount(places, minlength=20)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 43.8  # chi-squared, 19 degrees, p = 0.001


def test_audit(data: dict[str, Dataset]) -> None:
    found = data["raw"].info["audit"]
    assert found["events"]["duplicate_user_item_time"] == found["events"]["repeated_user_item"] == 0
    assert found["events"]["first_event"] == "1997-09-20"
    assert {leak["users_in_both"] for leak in found["leakage"].values()} == {0}
    assert {leak["equal_rows_in_both"] for leak in found["leakage"].values()} == {0}
    assert data["raw"].info["counts"]["test_target_time_tied"] == 39
    for name in ("movielens", "steam"):
        assert data[name].info["audit"]["leakage"]["train/test"]["users_in_both"] is None
        assert any("user is null" in note for note in data[name].info["notes"])


def test_same_bytes_again(shared: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    prepare("movielens", tmp_path / "again", shared / "data" / "ml-100k")
    for path in folders["raw"].iterdir():
        assert sha256_file(path) == sha256_file(tmp_path / "again" / path.name), path.name


def test_existing_folder_is_not_touched(shared: Path, folders: dict[str, Path]) -> None:
    before = {path.name: sha256_file(path) for path in folders["steam"].iterdir()}
    with pytest.raises(InputError, match="exists already"):
        prepare("steam", folders["steam"], shared / "data" / "llara-steam")
    assert {path.name: sha256_file(path) for path in folders["steam"].iterdir()} == before
