"""Work by ranges of users gives what work on the whole log gives, wherever the ranges end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llara_dist.data import dataset, dataset_tables, rows, sequences, tables, user_blocks
from llara_dist.data.exclusions import touched_items
from llara_dist.data.prepare import prepare
from llara_dist.integrity import sha256_file


def _columns(n: int = 500) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    return random.integers(0, 40, n).astype(np.int32), random.integers(0, 30, n).astype(np.int32)


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_blocks_hold_every_event_once(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(user_blocks, "_EVENTS_PER_BLOCK", size)
    users, _ = _columns()
    users[::9] = -1
    seen, last = [], 0
    for first, stop, events in user_blocks.user_blocks(users):
        assert first == last
        assert stop > first
        assert np.all((users[events] >= first) & (users[events] < stop))
        assert np.all(np.diff(events) > 0)
        seen.append(events)
        last = stop
    assert last == users.max() + 1
    assert np.array_equal(np.sort(np.concatenate(seen)), np.flatnonzero(users >= 0))
    assert user_blocks.count_ids(users, 50).tolist() == np.bincount(users[users >= 0], minlength=50).tolist()


@pytest.mark.parametrize("size", [1, 50])
def test_touched_items_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    users, items = _columns()
    offsets, touched = touched_items(users, items, 30)
    monkeypatch.setattr(user_blocks, "_EVENTS_PER_BLOCK", size)
    again = touched_items(users, items, 30)
    assert np.array_equal(offsets, again[0])
    assert np.array_equal(touched, again[1])
    for user in range(40):
        assert touched[offsets[user] : offsets[user + 1]].tolist() == sorted(set(items[users == user].tolist()))


@pytest.mark.parametrize("split", ["user", "leave_last_out", "temporal"])
def test_dataset_does_not_depend_on_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    """Small blocks of users, small batches of the CSV: the same bytes; small row groups: the same rows."""
    random = np.random.default_rng(1)
    lines = [f"u{u},i{i},{t}" for u, i, t in random.integers([0, 0, 0], [60, 40, 300], (3000, 3)).tolist()]
    (tmp_path / "events.csv").write_text("user,item,timestamp\n" + "\n".join(lines) + "\n")
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(f"i{i},Title {i}\n" for i in range(40)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: log\ndomain: movie\nsource: {kind: table, events: events.csv, items: items.csv}\n"
        "filters: {repeats: first, min_user_events: 3, min_item_events: 3}\ncandidates: {count: 5}\n"
        f"sequences: {{split: {split}, ratios: [0.6, 0.2, 0.2]}}\n"
    )
    whole = prepare(str(recipe), tmp_path / "whole")
    monkeypatch.setattr(user_blocks, "_EVENTS_PER_BLOCK", 100)
    monkeypatch.setattr(tables, "_BATCH_BYTES", 500)
    prepare(str(recipe), tmp_path / "blocks")
    for file in (tmp_path / "whole").iterdir():
        assert sha256_file(file) == sha256_file(tmp_path / "blocks" / file.name), file.name

    for room in (dataset_tables, sequences):
        monkeypatch.setattr(room, "ROWS_PER_CHUNK", 64)
    monkeypatch.setattr(rows.chunks, "__defaults__", (64,))
    chunked = prepare(str(recipe), tmp_path / "chunks")
    assert (chunked["counts"], chunked["audit"]) == (whole["counts"], whole["audit"])
    one, other = dataset.load_dataset(tmp_path / "whole"), dataset.load_dataset(tmp_path / "chunks")
    assert len(list(other.chunks("train"))) == -(-len(one.train) // 64) > 3
    for name in ("train", "val", "test"):
        for column in ("keys", "users", "offsets", "items", "targets"):
            assert np.array_equal(getattr(one.rows(name), column), getattr(other.rows(name), column))
        if name != "train":
            assert np.array_equal(one.candidates[name], other.candidates[name])
    assert all(np.array_equal(a, b) for a, b in zip(one.touched, other.touched, strict=True))
