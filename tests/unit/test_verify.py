"""`shards verify`: every kind of damage of every kind of file, told apart and placed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from llara_dist.cli import main
from llara_dist.data.damage import _PIECE, check_file
from llara_dist.data.shards import read_manifest, read_shards_info
from llara_dist.data.verify import verify
from llara_dist.errors import InputError
from llara_dist.integrity import sha256_bytes, sha256_json
from llara_dist.stream.reader import ShardSet

from . import worlds


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return worlds.write_shards(tmp_path_factory.mktemp("verify"))


def findings(copy: Path, **wanted) -> list[dict]:
    """The findings of a damaged folder whose fields are as wanted; each was printed or is counted in the one line."""
    with pytest.raises(InputError) as caught:
        verify(copy)
    assert "\n" not in str(caught.value)
    assert caught.value.result is not None
    found = caught.value.result["findings"]
    assert f"{len(found)} findings" in str(caught.value)
    return [finding for finding in found if all(finding[name] == value for name, value in wanted.items())]


def only(copy: Path) -> dict:
    """The one finding of a folder."""
    found = findings(copy)
    assert len(found) == 1
    return found[0]


def test_what_was_built_passes(root):
    found = verify(root / "shards")
    assert found["ok"]
    assert found["findings"] == []
    assert found["samples"] == sum(len(ShardSet.open(root / "shards", split)) for split in ("train", "val", "test"))


def test_tells_missing_truncated_altered(copy):
    shards = ShardSet.open(copy)
    path, file = copy / "train/000002.tar", "train/000002.tar"
    rows = shards.index.shard(2)
    offset, key, size = int(rows.offsets[5]), int(rows.keys[5]), int(rows.sizes[5])
    whole = path.read_bytes()

    worlds.damage(path, offset + 3)
    shard, sample = findings(copy)
    assert (shard["file"], shard["kind"], shard["split"], shard["shard"]) == (file, "altered", "train", "000002.tar")
    assert (sample["kind"], sample["offset"], sample["key"]) == ("altered", offset, key)

    path.write_bytes(whole[: offset + 10])
    found = findings(copy, file=file)
    damaged = f"{len(rows) - 5} of its {len(rows)} samples are damaged"
    assert found[0]["detail"] == f"truncated, {offset + 10} of {len(whole)} bytes; {damaged}"
    assert (found[1]["offset"], found[1]["detail"]) == (offset, f"truncated, 10 of {size} bytes")
    assert found[2]["detail"].startswith("truncated, 0 of")
    assert [finding["key"] for finding in found[1:]] == rows.keys[5:].tolist()

    path.write_bytes(whole[:-512])
    assert only(copy)["kind"] == "truncated"
    path.write_bytes(whole + bytes(512))
    found = only(copy)
    assert found["kind"] == "altered"
    assert found["detail"].endswith(f"{len(whole) + 512} bytes instead of {len(whole)}; up to there it is as built")
    path.write_bytes(whole)
    worlds.damage(path, offset - 512)
    assert "no sample is affected" in only(copy)["detail"]
    path.unlink()
    assert only(copy)["kind"] == "missing"
    path.mkdir()
    assert only(copy)["detail"] == "altered, it is no regular file"
    path.rmdir()
    path.write_bytes(whole)
    assert verify(copy)["ok"]


def test_renamed_and_swapped_files_are_named(copy):
    (copy / "train/000001.tar").rename(copy / "train/000099.tar")
    assert {(finding["file"], finding["kind"]) for finding in findings(copy)} == {
        ("train/000001.tar", "missing"),
        ("train/000099.tar", "unexpected"),
    }
    (copy / "train/000099.tar").rename(copy / "train/000001.tar")
    one, other = copy / "train/000000.tar", copy / "train/000003.tar"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert [(finding["file"], finding["kind"], finding["detail"]) for finding in findings(copy)] == [
        ("train/000000.tar", "foreign", "foreign, it holds the bytes of train/000003.tar"),
        ("train/000003.tar", "foreign", "foreign, it holds the bytes of train/000000.tar"),
    ]


def test_unexpected_files_alone_need_no_repair(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "val/more").mkdir()
    with pytest.raises(InputError, match="all that was built is whole; move away what does not belong") as caught:
        verify(copy)
    assert caught.value.result is not None
    assert [finding["file"] for finding in caught.value.result["findings"]] == ["notes.txt", "val/more"]


@pytest.mark.parametrize("name", ["train/manifest.json", "val/manifest.json"])
def test_damaged_manifests(copy, name):
    path = copy / name
    whole = path.read_text()
    value = json.loads(whole)
    value["num_items"] += 1
    path.write_text(json.dumps(value, indent=2) + "\n")
    assert only(copy)["detail"] == "altered: its content does not have the hash it names"
    # Sealing the altered file again does not help: shards.json names each manifest's hash.
    value["hash"] = sha256_json({field: entry for field, entry in value.items() if field != "hash"})
    path.write_text(json.dumps(value, indent=2) + "\n")
    assert only(copy)["detail"] == "foreign, it belongs to another build than shards.json"
    shutil.copy(copy / "test/manifest.json", path)
    assert only(copy)["detail"] == "foreign, it is the manifest of 'test'"
    shutil.copy(copy / "shards.json", path)
    assert only(copy)["detail"] == "foreign, it is shards.json"
    path.write_text(whole + " ")
    assert "white space alone" in only(copy)["detail"]
    path.write_text(whole[:-30])
    assert "not JSON" in only(copy)["detail"]
    path.write_text("[" * 100_000)
    assert "not JSON" in only(copy)["detail"]
    path.unlink()
    assert only(copy)["kind"] == "missing"
    # Without its manifest a split's files can only be missing or superfluous; shards.json says how many there are.
    (copy / name).with_name("000000.tar").rename((copy / name).with_name("copy.tar"))
    assert {(finding["kind"], Path(finding["file"]).name) for finding in findings(copy)} == {
        ("missing", "manifest.json"),
        ("missing", "000000.tar"),
        ("unexpected", "copy.tar"),
    }


def test_damaged_shards_json_hides_nothing_else(copy):
    worlds.damage(copy / "train/000002.tar", 2000)
    worlds.damage(copy / "test/000000.tar", 2000)
    worlds.damage(copy / "shards.json", 400)
    shutil.copy(copy / "train/manifest.json", copy / "val/manifest.json")
    found = {(finding["file"], finding["kind"]) for finding in findings(copy)}
    assert found == {
        ("shards.json", "altered"),
        ("train/000002.tar", "altered"),
        ("val/manifest.json", "foreign"),
        ("test/000000.tar", "altered"),
    }
    (copy / "shards.json").unlink()
    (copy / "items.parquet").unlink()
    assert {finding["file"] for finding in findings(copy, kind="missing")} == {"shards.json", "items.parquet"}


def test_manifests_of_two_builds_cannot_be_mixed_without_shards_json(copy):
    (copy / "shards.json").unlink()
    value = json.loads((copy / "test/manifest.json").read_text())
    value["recipe"]["seed"] = 7
    value["hash"] = sha256_json({field: entry for field, entry in value.items() if field != "hash"})
    (copy / "test/manifest.json").write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    assert findings(copy, file="test/manifest.json")[0]["detail"] == (
        "foreign, it belongs to another build than train/manifest.json"
    )


def test_one_damaged_index_batch_hides_nothing_else(copy):
    path = copy / "train/index.arrow"
    whole = path.read_bytes()
    manifest = read_manifest(copy, "train", read_shards_info(copy))
    batches, names = manifest["index"]["record_batches"], [shard["name"] for shard in manifest["shards"]]
    worlds.damage(path, batches[2]["offset"] + batches[2]["bytes"] // 2)
    worlds.damage(copy / "train/000002.tar", 2000)
    worlds.damage(copy / "train/000003.tar", 2000)
    index = findings(copy, file="train/index.arrow")
    assert [(finding["kind"], finding["shard"], finding["offset"]) for finding in index] == [
        ("altered", None, None),
        ("altered", names[2], batches[2]["offset"]),
    ]
    # Where the index is damaged a tar is still held against its sha256; where it is whole, against each sample.
    assert [finding["key"] for finding in findings(copy, file="train/000002.tar")] == [None]
    assert len(findings(copy, file="train/000003.tar")) == 2

    path.write_bytes(whole[: batches[4]["offset"] + 10])
    index = findings(copy, file="train/index.arrow")
    assert index[0]["detail"] == f"truncated, {batches[4]['offset'] + 10} of {len(whole)} bytes"
    assert [finding["shard"] for finding in index[1:]] == names[4:]
    path.write_bytes(whole)
    worlds.damage(path, len(whole) - 20)
    assert "no shard's record batch is affected" in findings(copy, file="train/index.arrow")[0]["detail"]
    path.unlink()
    assert [finding["kind"] for finding in findings(copy, file="train/index.arrow")] == ["missing"]
    shutil.copy(copy / "val/index.arrow", path)
    assert [finding["detail"] for finding in findings(copy, file="train/index.arrow")] == [
        "foreign, it holds the bytes of val/index.arrow"
    ]


def test_many_findings_are_counted_not_listed(copy, capsys, monkeypatch):
    monkeypatch.setattr("llara_dist.data.damage._LISTED_SAMPLES", 20)
    path = copy / "train/000000.tar"
    path.write_bytes(bytes(path.stat().st_size))
    assert len(findings(copy)) == 1 + 20
    printed = capsys.readouterr().out
    assert printed.count("sample at offset") == 5
    assert "60 of its 60 samples are damaged" in printed


def test_a_sample_over_two_pieces_is_checked_like_any_other(tmp_path):
    import zlib

    import numpy as np

    from llara_dist.data.shard_index import ShardIndex

    data = np.random.default_rng(0).bytes(3 * _PIECE)
    (tmp_path / "a.tar").write_bytes(data)
    offsets, sizes = np.array([10, _PIECE - 5, _PIECE + 100]), np.array([_PIECE - 20, 90, 2 * _PIECE - 101])
    crc32 = [zlib.crc32(data[start : start + size]) for start, size in zip(offsets, sizes, strict=True)]
    other = np.zeros(3, np.int32)
    rows = ShardIndex(np.arange(3), offsets, sizes, other, other, other, np.array(crc32))
    entry = {"bytes": len(data), "sha256": sha256_bytes(data)}
    assert check_file(tmp_path, "a.tar", entry, {}, rows) == []
    for row, place in ((0, 10), (0, _PIECE - 11), (1, _PIECE - 5), (1, _PIECE), (1, _PIECE + 84), (2, 2 * _PIECE)):
        worlds.damage(tmp_path / "a.tar", place)
        assert [found.key for found in check_file(tmp_path, "a.tar", entry, {}, rows)] == [None, row], place
        worlds.damage(tmp_path / "a.tar", place)
    worlds.damage(tmp_path / "a.tar", _PIECE + 85)
    assert [found.key for found in check_file(tmp_path, "a.tar", entry, {}, rows)] == [None]


@pytest.mark.parametrize("place", [0, 1])
def test_json_lists_the_findings(copy, capsys, place):
    arguments = [str(copy)]
    arguments.insert(place, "--json")
    main(["shards", "verify", *arguments])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"] is True
    os.truncate(copy / "val/000000.tar", 700)
    with pytest.raises(SystemExit) as stop:
        main(["shards", "verify", *arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert found["ok"] is False
    assert set(found["findings"][0]) == {"file", "kind", "detail", "split", "shard", "offset", "key"}
    assert found["findings"][0]["kind"] == "truncated"
    assert len(printed.err.splitlines()) == 1
    assert f"llara-dist shards repair {copy} --data DATA" in printed.err


def test_what_is_no_shards_folder(tmp_path):
    with pytest.raises(InputError, match=r"shards.json: not found; expected a shards folder"):
        verify(tmp_path)
    with pytest.raises(InputError, match=r"--processes is 0"):
        verify(tmp_path, processes=0)
