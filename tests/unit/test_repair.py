"""`shards repair`: only what is damaged is rebuilt, byte for byte; what cannot be proven is refused or said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llara_dist.cli import main
from llara_dist.data import rebuild as rebuild_room
from llara_dist.data.build import build
from llara_dist.data.rebuild import index_of_tar
from llara_dist.data.repair import repair
from llara_dist.data.shards import read_manifest, read_shards_info
from llara_dist.data.verify import REPAIR_STAGING, verify
from llara_dist.errors import InputError
from llara_dist.stream.reader import ShardSet

from . import worlds


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return worlds.write_shards(tmp_path_factory.mktemp("repair"))


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Of every file its inode and when it was last written."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            status = path.stat()
            found[str(path.relative_to(folder))] = (status.st_ino, status.st_mtime_ns)
    return found


def repaired(root: Path, copy: Path, **options) -> set[str]:
    """Repair a copy; it must be as the original again, and only the files that were rebuilt be touched."""
    before = state(copy)
    found = repair(copy, root / "data", processes=1, **options)
    assert worlds.files(copy) == worlds.files(root / "shards")
    after = state(copy)
    assert {file for file in after if before.get(file) != after[file]} == set(found["repaired"])
    assert verify(copy)["ok"]
    return set(found["repaired"])


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def middle(path: Path) -> None:
    worlds.damage(path, path.stat().st_size // 2)


def space(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


SHARD, INDEX, MANIFEST = "train/000003.tar", "train/index.arrow", "train/manifest.json"


@pytest.mark.parametrize("damage", [cut, middle, space, Path.unlink], ids=["cut", "altered", "longer", "missing"])
@pytest.mark.parametrize(
    "names",
    [
        (SHARD,),
        ("train/000000.tar", SHARD, "val/000000.tar"),
        (INDEX,),
        (SHARD, INDEX),
        (MANIFEST,),
        (MANIFEST, INDEX),
        (MANIFEST, SHARD),
        ("items.parquet",),
        ("shards.json",),
        ("shards.json", "items.parquet"),
        ("shards.json", SHARD, INDEX),
        ("shards.json", MANIFEST),
        ("shards.json", "val/manifest.json", "val/000000.tar", "val/index.arrow", SHARD),
    ],
    ids="+".join,
)
def test_what_is_damaged_is_rebuilt_byte_for_byte(root, copy, names, damage):
    for name in names:
        damage(copy / name)
    given = {"tokenizer": str(root / "tokenizer")} if "shards.json" in names else {}
    assert repaired(root, copy, **given) == set(names)


def test_whole_folder_of_a_split_missing(root, copy):
    shutil.rmtree(copy / "test")
    assert repaired(root, copy) == {"test/manifest.json", "test/index.arrow", "test/000000.tar"}


def test_swapped_files_are_put_right(root, copy):
    for one, other in (("train/000000.tar", "train/000001.tar"), (MANIFEST, "val/manifest.json")):
        first, second = (copy / one).read_bytes(), (copy / other).read_bytes()
        (copy / one).write_bytes(second)
        (copy / other).write_bytes(first)
    expected = {"train/000000.tar", "train/000001.tar", MANIFEST, "val/manifest.json"}
    assert repaired(root, copy) == expected


def test_nothing_to_repair(root, copy, capsys):
    before = state(copy)
    main(["shards", "repair", str(copy), "--data", "/nowhere", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["ok"], found["repaired"], found["unexpected"]) == (True, [], [])
    assert state(copy) == before


def test_unexpected_files_are_named_and_left(root, copy, capsys):
    (copy / "train/000099.tar").write_bytes(b"mine")
    assert repair(copy, root / "data")["unexpected"] == ["train/000099.tar"]
    middle(copy / SHARD)
    found = repair(copy, root / "data", processes=2)
    assert (found["repaired"], found["unexpected"]) == ([SHARD], ["train/000099.tar"])
    printed = capsys.readouterr().out
    assert "all as built; 1 files do not belong there and were left alone: train/000099.tar" in printed
    assert (copy / "train/000099.tar").read_bytes() == b"mine"
    (copy / "train/000099.tar").unlink()
    assert worlds.files(copy) == worlds.files(root / "shards")


def refused(copy: Path, message: str, *arguments, **options) -> None:
    """Repair ends with this error in one line, and not a byte has changed."""
    before, contents = state(copy), worlds.files(copy)
    with pytest.raises(InputError, match=message) as caught:
        repair(copy, *arguments, **options)
    assert "\n" not in str(caught.value)
    assert state(copy) == before
    assert worlds.files(copy) == contents


def test_other_data_or_tokenizer_is_refused_before_anything_is_touched(root, copy, tmp_path):
    middle(copy / SHARD)
    worlds.write_world(tmp_path / "other", num_users=40, seed=1)
    refused(copy, "the shards were built from .* give that one by --data", tmp_path / "other")
    worlds.byte_level(vocabulary=500).save_pretrained(tmp_path / "tokenizer")
    refused(copy, "not the tokenizer", root / "data", tokenizer=str(tmp_path / "tokenizer"))
    refused(copy, "dataset.json: not found", tmp_path)
    refused(copy, "--processes is 0", root / "data", processes=0)
    shutil.copytree(root / "tokenizer", tmp_path / "moved")
    assert repaired(root, copy, tokenizer=str(tmp_path / "moved")) == {SHARD}


@pytest.mark.parametrize("name", [SHARD, INDEX, MANIFEST, "items.parquet"])
def test_a_release_that_builds_otherwise_is_refused(root, copy, name, monkeypatch):
    """As another release might: titles written otherwise, other rows in a shard, the index in another order."""
    middle(copy / name)
    if name == MANIFEST:
        middle(copy / SHARD)  # else the tars prove the manifest, whatever the release would build

    def other_items(path: Path, titles: list[str], shown: list[str]) -> None:
        path.write_bytes(b"other")

    def other_shards(split, seed, *arguments):
        yield from place_shards(split, seed + 1, *arguments)

    place_shards, write_index = rebuild_room.place_shards, rebuild_room.write_index
    monkeypatch.setattr(rebuild_room, "write_items", other_items)
    monkeypatch.setattr(rebuild_room, "place_shards", other_shards)
    monkeypatch.setattr("llara_dist.data.repair.write_index", lambda path, rows: write_index(path, rows[::-1]))
    refused(copy, f"{name}: what was rebuilt has another sha256.*the damaged file was left", root / "data", processes=1)
    assert not (copy / REPAIR_STAGING).exists()


def test_no_record_left(root, copy):
    for path in copy.rglob("*.json"):
        middle(path)
    refused(copy, "nothing says how the shards were built; build them again", root / "data")


def test_a_lost_shards_json_is_derived_and_said_to_be(root, copy, capsys):
    (copy / "shards.json").unlink()
    refused(copy, "shards.json: damaged, it named the tokenizer; give it by --tokenizer", root / "data")
    found = repair(copy, root / "data", tokenizer=str(root / "tokenizer"))
    assert found["unproven"] == ["shards.json"]
    assert "shards.json: derived from what is left; nothing that survived names its hash" in capsys.readouterr().out
    assert worlds.files(copy) == worlds.files(root / "shards")


def test_a_damaged_shards_json_that_still_names_its_hash_proves_what_was_derived(root, copy, tmp_path):
    path = copy / "shards.json"
    path.write_text(path.read_text().replace('"longest_row_tokens": ', '"longest_row_tokens": 1', 1))
    middle(copy / MANIFEST)
    # The tokenizer has moved; the recorded name comes from the damaged file.
    shutil.copytree(root / "tokenizer", tmp_path / "moved")
    found = repair(copy, root / "data", tokenizer=str(tmp_path / "moved"))
    assert found["unproven"] == []
    assert worlds.files(copy) == worlds.files(root / "shards")


def test_rows_cut_to_fit_are_counted_again(root, tmp_path):
    """shards.json holds how much history was dropped; it is derived from the index and the data set."""
    settings = {"passes": 2, "processes": 1, "samples_per_shard": 60, "max_tokens": 230, "max_title_tokens": 8}
    info = build(root / "data", str(root / "tokenizer"), tmp_path / "short", **settings)
    assert info["splits"]["train"]["history_items_dropped"] > 0
    whole = worlds.files(tmp_path / "short")
    (tmp_path / "short/shards.json").unlink()
    repair(tmp_path / "short", root / "data", tokenizer=str(root / "tokenizer"))
    assert worlds.files(tmp_path / "short") == whole


def test_index_of_a_tar_is_the_build_s(root):
    manifest = read_manifest(root / "shards", "train", read_shards_info(root / "shards"))
    opened = ShardSet.open(root / "shards")
    for number, shard in enumerate(manifest["shards"]):
        found, expected = index_of_tar(root / "shards/train" / shard["name"]), opened.index.shard(number)
        for name, column in vars(expected).items():
            assert vars(found)[name].tolist() == column.tolist(), name


def test_readers_at_work_keep_what_they_opened(root, copy):
    opened = ShardSet.open(copy)
    first = [sample.tokens.tolist() for sample in opened.read(range(len(opened)))]
    middle(copy / SHARD)
    middle(copy / INDEX)
    repair(copy, root / "data", processes=1)
    again = ShardSet.open(copy)
    assert [sample.tokens.tolist() for sample in again.read(range(len(again)))] == first


def test_one_repair_at_a_time(root, copy):
    import fcntl

    middle(copy / SHARD)
    (copy / REPAIR_STAGING).mkdir()
    with open(copy / REPAIR_STAGING / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(copy, "another `shards repair` works on it", root / "data")
    assert repaired(root, copy) == {SHARD}


def test_killed_in_the_middle_it_is_run_again(root, copy):
    """Killed whenever it stages a file: nothing half-written stands under a final name, and the next run ends well."""
    original = worlds.files(root / "shards")
    for path in [*copy.glob("*/*.tar"), copy / MANIFEST, copy / INDEX, copy / "items.parquet"]:
        middle(path)
    damaged = worlds.files(copy)
    script = "import sys; from llara_dist.data.repair import repair; repair(*sys.argv[1:3], processes=1)"
    command = [sys.executable, "-c", script, str(copy), str(root / "data")]

    def staged() -> set[str]:
        return {path.name for path in copy.glob(f"{REPAIR_STAGING}/*.*")}

    seen: set[str] = set()
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while (now := staged()) <= seen and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        seen |= now
        process.send_signal(signal.SIGKILL)
        process.wait()
        for name, data in worlds.files(copy).items():
            assert name.startswith(REPAIR_STAGING) or data in (damaged[name], original[name]), name
    assert seen, "killed before it wrote: nothing was tested"
    repair(copy, root / "data", processes=1)
    assert worlds.files(copy) == original
    (copy / REPAIR_STAGING).mkdir()
    with pytest.raises(InputError, match="left by a repair that was interrupted; run it again"):
        verify(copy)
    assert repair(copy, root / "data")["unexpected"] == []
    assert worlds.files(copy) == original
    assert not (copy / REPAIR_STAGING).exists()
