"""Shards: the same bytes on rebuild, plain WebDataset, every damage found, every row the whole string's ids."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llara_dist.data.build import build
from llara_dist.data.dataset import load_dataset
from llara_dist.data.drawing import draw_templates
from llara_dist.data.inspect import find_sample, inspect_sample, matching_tokenizer
from llara_dist.data.placement import place_rows
from llara_dist.data.prompts import PromptEncoder
from llara_dist.data.samples import unpack
from llara_dist.data.shards import member_name, read_index, read_manifest, read_shards_info
from llara_dist.data.tokenizer import load_tokenizer
from llara_dist.data.verify import verify
from llara_dist.data.wording import load_templates
from llara_dist.errors import InputError
from llara_dist.integrity import sha256_bytes
from llara_dist.stream.reader import ShardSet

from . import worlds


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return worlds.write_shards(tmp_path_factory.mktemp("shards"))


def make(root: Path, name: str, **settings) -> dict:
    settings = {"passes": 2, "processes": 1, "samples_per_shard": 60, **settings}
    return build(root / "data", str(root / "tokenizer"), root / name, **settings)


def test_same_bytes_whatever_the_processes(root):
    make(root, "again", processes=3)
    assert worlds.files(root / "again") == worlds.files(root / "shards")


def test_every_row_of_every_pass_is_there_once(root):
    dataset = load_dataset(root / "data")
    for split, passes in (("train", 2), ("val", 1), ("test", 1)):
        shards = ShardSet.open(root / "shards", split)
        rows = dataset.rows(split)
        assert shards.num_passes == passes
        assert len(shards) == passes * len(rows)
        for number in range(passes):
            assert sorted(shards.all.keys[shards.all.passes == number].tolist()) == rows.keys.tolist()
        place = {int(key): row for row, key in enumerate(rows.keys)}
        for sample in shards.read(range(len(shards))):
            row = place[sample.key]
            np.testing.assert_array_equal(sample.history, rows.history(row))
            assert sample.target == rows.targets[row]
            assert len(set(sample.candidates.tolist())) == 20
            if split != "train":
                np.testing.assert_array_equal(sample.candidates, dataset.candidates[split][row])
            offsets, excluded = dataset.exclusions(split, row, row + 1)
            assert len(offsets) == 2
            assert not (set(sample.candidates.tolist()) - {sample.target}) & set(excluded.tolist())


def test_every_row_is_the_whole_string(root):
    check_every_row(root / "data", root / "shards", str(root / "tokenizer"))


def check_every_row(data: Path, shards: Path, tokenizer: str) -> int:
    """Compare each stored row with the tokenisation of its whole text; returns how many."""
    dataset, info = load_dataset(data), read_shards_info(shards)
    recipe = info["recipe"]
    encoder = PromptEncoder(
        load_tokenizer(tokenizer), dataset.titles, load_templates(dataset.domain), recipe["max_title_tokens"]
    )
    assert [template.text for template in encoder.templates] == recipe["templates"]
    compared = 0
    for split in ("train", "val", "test"):
        opened = ShardSet.open(shards, split)
        for start in range(0, len(opened), 4096):
            ids = np.arange(start, min(start + 4096, len(opened)))
            for sample in opened.read(ids):
                template = int(draw_templates(np.array([sample.key]), recipe["seed"], sample.pass_index, 3)[0])
                whole = encoder.whole_ids(encoder.text(sample.history, sample.candidates, template), sample.target)
                np.testing.assert_array_equal(np.delete(sample.tokens, sample.slot_positions), whole)
                compared += 1
        lengths = [opened.all.tokens.sum(), opened.all.slots.sum(), opened.all.answer_tokens.sum()]
        read = opened.read(range(len(opened)))
        assert lengths[0] == sum(len(sample.tokens) for sample in read)
        assert lengths[1] == sum(len(sample.slot_positions) for sample in read)
        assert lengths[2] == sum(sample.answer_end - sample.answer_start for sample in read)
    return compared


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["sentencepiece", "llama3"])
def test_every_row_of_movielens_is_the_whole_string(shared, tmp_path, family):
    from llara_dist.data.prepare import prepare

    prepare("movielens", tmp_path / "data", shared / "data/ml-100k")
    tokenizer = shared / "models/llama2-tokenizer"
    if family == "llama3":
        tokenizer = tmp_path / "tokenizer"
        worlds.byte_level(vocabulary=2000).save_pretrained(tokenizer)
    build(tmp_path / "data", str(tokenizer), tmp_path / "shards")
    assert check_every_row(tmp_path / "data", tmp_path / "shards", str(tokenizer)) == 66_126 + 94 + 95


def test_passes_differ_and_users_are_spread(root):
    shards = ShardSet.open(root / "shards")
    first = {sample.key: sample for sample in shards.read(np.flatnonzero(shards.all.passes == 0))}
    second = {sample.key: sample for sample in shards.read(np.flatnonzero(shards.all.passes == 1))}
    same = sum(first[key].candidates.tolist() == second[key].candidates.tolist() for key in first)
    assert same == 0
    order = [sample.key for sample in shards.read(np.flatnonzero(shards.all.passes == 0))]
    assert order != [sample.key for sample in shards.read(np.flatnonzero(shards.all.passes == 1))]
    # Neighbouring keys are windows of one user; in a shuffle a step of one is about as rare as any other.
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.05
    keys = load_dataset(root / "data").train.keys
    assert order == keys[place_rows(keys, 0, 0)].tolist()


def test_every_template_is_drawn(root):
    drawn = draw_templates(np.arange(3000), 0, 0, 3)
    assert np.bincount(drawn).min() > 900
    assert not np.array_equal(drawn, draw_templates(np.arange(3000), 0, 1, 3))


def test_index_and_manifest_describe_the_files(root):
    folder = root / "shards/train"
    info = read_shards_info(root / "shards")
    manifest = read_manifest(root / "shards", "train", info)
    index = read_index(folder, manifest)
    assert [shard["name"] for shard in manifest["shards"]] == sorted(path.name for path in folder.glob("*.tar"))
    for number, shard in enumerate(manifest["shards"]):
        data = (folder / shard["name"]).read_bytes()
        assert (len(data), sha256_bytes(data)) == (shard["bytes"], shard["sha256"])
        rows = index.shard(number)
        assert len(rows) == shard["samples"]
        with tarfile.open(folder / shard["name"]) as tar:
            for row, member in enumerate(tar.getmembers()):
                assert member.name == member_name(shard["pass"], int(rows.keys[row]))
                assert (member.offset_data, member.size) == (rows.offsets[row], rows.sizes[row])
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o444)
                payload = data[rows.offsets[row] : rows.offsets[row] + rows.sizes[row]]
                assert zlib.crc32(payload) == rows.crc32[row]
                sample = unpack(payload)
                assert len(sample.tokens) == rows.tokens[row]
                assert len(sample.slot_items) == rows.slots[row]
                assert sample.answer_end - sample.answer_start == rows.answer_tokens[row]


def test_any_arrow_reader_reads_the_index(root):
    folder = root / "shards/train"
    manifest = read_manifest(root / "shards", "train", read_shards_info(root / "shards"))
    file = pa.ipc.open_file(folder / "index.arrow")
    batches = manifest["index"]["record_batches"]
    assert file.num_record_batches == len(manifest["shards"]) == len(batches)
    assert file.schema.names == ["key", "offset", "bytes", "tokens", "slots", "answer_tokens", "crc32"]
    index = read_index(folder, manifest)
    for number in range(len(batches)):
        found = file.get_batch(number)
        np.testing.assert_array_equal(found["key"].to_numpy(), index.shard(number).keys)
        np.testing.assert_array_equal(found["crc32"].to_numpy(), index.shard(number).crc32)
    data = (folder / "index.arrow").read_bytes()
    ends = [batches[0]["offset"]]
    for batch in batches:
        assert batch["offset"] == ends[-1]
        ends.append(batch["offset"] + batch["bytes"])
        assert sha256_bytes(data[batch["offset"] : ends[-1]]) == batch["sha256"]
    assert ends[-1] < len(data)


def test_the_index_is_looked_at_shard_by_shard(root):
    shards = ShardSet.open(root / "shards")
    assert not shards.index._shards
    found = shards.lookup(shards.first_ids[[1, 2]])
    assert found.keys.tolist() == [int(shards.index.shard(number).keys[0]) for number in (1, 2)]
    assert set(shards.index._shards) == {1, 2}


def test_stock_webdataset_reads_them(root):
    import webdataset

    manifest = read_manifest(root / "shards", "train", read_shards_info(root / "shards"))
    urls = [str(root / "shards/train" / shard["name"]) for shard in manifest["shards"]]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False)
    records = list(pipeline)
    shards = ShardSet.open(root / "shards")
    samples = shards.read(range(len(shards)))
    assert len(records) == len(samples)
    for record, sample in zip(records, samples, strict=True):
        assert record["__key__"] == f"{sample.pass_index:02d}-{sample.key:010d}"
        np.testing.assert_array_equal(unpack(record["mp"]).tokens, sample.tokens)
    decoded = next(iter(webdataset.WebDataset(urls, shardshuffle=False).decode()))["mp"]
    np.testing.assert_array_equal(np.frombuffer(decoded["tokens"], "<u4"), samples[0].tokens)


def test_settings_change_the_bytes_as_they_should(root):
    base = read_shards_info(root / "shards")
    other = make(root, "seeded", seed=1)
    assert other["splits"]["train"]["hash"] != base["splits"]["train"]["hash"]
    one = make(root, "one-pass", passes=1)
    whole = worlds.files(root / "shards/train")
    for name, data in worlds.files(root / "one-pass/train").items():
        if name.endswith(".tar"):
            assert data == whole[name], "a pass does not depend on how many there are"
    assert one["splits"]["train"]["samples"] * 2 == base["splits"]["train"]["samples"]


def test_limits_are_kept_and_counted(root, tmp_path):
    info = make(root, "short", max_tokens=230, max_title_tokens=8, overwrite=True)
    dataset = load_dataset(root / "data")
    shards = ShardSet.open(root / "short")
    assert shards.all.tokens.max() <= 230
    place = {int(key): row for row, key in enumerate(dataset.train.keys)}
    rows = items = 0
    for sample in shards.read(range(len(shards))):
        history = dataset.train.history(place[sample.key])
        missing = len(history) - sample.num_history
        np.testing.assert_array_equal(sample.history, history[missing:])
        rows, items = rows + (missing > 0), items + missing
    train = info["splits"]["train"]
    assert rows > 0
    assert (train["rows_with_history_dropped"], train["history_items_dropped"]) == (rows, items)
    titles = pq.read_table(root / "short/items.parquet").to_pydict()
    cut = sum(shown != " ".join(title.split()) for title, shown in zip(titles["title"], titles["shown"], strict=True))
    assert info["counts"]["titles_cut"] == cut > 0
    with pytest.raises(InputError, match=r"key \d+: needs .* the limit is 60"):
        make(root, "too-short", max_tokens=60)
    assert not (root / "too-short").exists()
    assert not list(root.glob(".too-short*"))
    with pytest.raises(InputError, match=r"key \d+: needs .* the limit is 60"):
        make(root, "too-short", max_tokens=60, processes=2)


def test_existing_folder_needs_overwrite(root, copy):
    before = worlds.files(copy)
    settings = {"processes": 1, "passes": 1}
    with pytest.raises(InputError, match="exists already"):
        build(root / "data", str(root / "tokenizer"), copy, **settings)
    assert worlds.files(copy) == before
    with pytest.raises(InputError, match="replaces a shards folder only"):
        build(root / "data", str(root / "tokenizer"), root / "data", overwrite=True, **settings)
    assert (root / "data" / "dataset.json").is_file()
    build(root / "data", str(root / "tokenizer"), copy, overwrite=True, **settings)
    assert read_shards_info(copy)["recipe"]["passes"] == 1
    assert verify(copy)["ok"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"passes": 0}, "--passes is 0"),
        ({"passes": 100}, "at most 99"),
        ({"processes": 0}, "--processes is 0"),
        ({"samples_per_shard": 0}, "--samples_per_shard is 0"),
        ({"max_title_tokens": 0}, "max_title_tokens is 0"),
        ({"templates": "nothing"}, "neither one of"),
    ],
)
def test_bad_settings(root, settings, message):
    with pytest.raises(InputError, match=message):
        make(root, "bad", **settings)
    assert not (root / "bad").exists()


def test_killed_build_leaves_nothing_under_the_final_name(root, tmp_path):
    script = "import sys; from llara_dist.data.build import build; build(*sys.argv[1:4], passes=60, processes=1)"
    out = tmp_path / "killed"
    command = [sys.executable, "-c", script, str(root / "data"), str(root / "tokenizer"), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".killed*/train/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(tmp_path.glob(".killed*")), "killed before it wrote: nothing was tested"
    assert not out.exists()


def test_killed_build_leaves_no_processes(root, tmp_path):
    script = "import sys; from llara_dist.data.build import build; build(*sys.argv[1:4], passes=60, processes=2)"
    command = [sys.executable, "-c", script, str(root / "data"), str(root / "tokenizer"), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".killed*/train/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(group_members(process.pid)) >= 3, "no workers: nothing was tested"
    process.send_signal(signal.SIGKILL)
    process.wait()
    while group_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert group_members(process.pid) == []


def group_members(group: int) -> list[int]:
    """Processes of a process group that have not ended."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(number) == group and state not in "ZX":
            members.append(int(stat.parent.name))
    return members


def test_a_damaged_index_batch_stops_only_its_reads(copy):
    manifest = read_manifest(copy, "train", read_shards_info(copy))
    batch = manifest["index"]["record_batches"][2]
    worlds.damage(copy / "train/index.arrow", batch["offset"] + batch["bytes"] // 2)
    shards = ShardSet.open(copy)
    assert len(shards.lookup(np.arange(3)).keys) == 3
    with pytest.raises(InputError, match=rf"index.arrow: record batch of shard 000002.tar at offset {batch['offset']}"):
        shards.read([shards.first_ids[2]])


def test_an_index_cut_while_it_is_mapped_is_an_error_and_no_crash(copy):
    shards = ShardSet.open(copy)
    shards.lookup(shards.first_ids[:1])
    os.truncate(copy / "train/index.arrow", 100)
    with pytest.raises(InputError, match=r"index.arrow: truncated while it was in use, 100 of \d+ bytes"):
        shards.lookup(shards.first_ids[-2:-1])


def test_a_manifest_in_the_place_of_shards_json_is_refused(copy):
    shutil.copy(copy / "train/manifest.json", copy / "shards.json")
    with pytest.raises(InputError, match=r"shards.json: holds a shard set's manifest"):
        ShardSet.open(copy)


def test_reader_refuses_what_is_not_whole(copy):
    path = copy / "train/000000.tar"
    shards = ShardSet.open(copy)
    row = 0
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"000000.tar: \d+ bytes, the manifest names"):
        ShardSet.open(copy)
    path.unlink()
    with pytest.raises(InputError, match=r"000000.tar: missing"):
        ShardSet.open(copy)
    with pytest.raises(InputError, match=r"000000.tar: cannot be read"):
        shards.read([row])
    path.write_bytes(whole)
    assert shards.read([row])[0].key == shards.all.keys[row]
    with pytest.raises(InputError, match="no split 'dev'"):
        ShardSet.open(copy, "dev")
    with pytest.raises(InputError, match=r"shards.json: not found"):
        ShardSet.open(copy / "train")


def test_other_format_version_is_refused(copy):
    path = copy / "shards.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 99'))
    with pytest.raises(InputError, match="format_version 99"):
        ShardSet.open(copy)


def test_inspect_shows_a_sample(root, capsys):
    dataset = load_dataset(root / "data")
    key = int(dataset.val.keys[0])
    found = inspect_sample(root / "shards", key)
    printed = capsys.readouterr().out
    assert found["split"] == "val"
    assert found["candidates"] == dataset.candidates["val"][0].tolist()
    assert found["target"] == dataset.val.targets[0]
    shown = pq.read_table(root / "shards/items.parquet")["shown"].to_pylist()
    slots = [*found["history"], *found["candidates"]]
    hybrid = found["hybrid"]
    for item in slots:
        # The token that ends a title may hold the punctuation after it ("dot.,"); the slot follows that token.
        assert re.search(re.escape(shown[item]) + r"[,.?]*" + f"⟨item {item}⟩", hybrid)
    assert hybrid.count("⟨item ") == len(slots)
    without = hybrid
    for item in slots:
        without = without.replace(f"⟨item {item}⟩", "")
    assert without == found["text_only"]
    assert found["text_only"].endswith(f"Answer:{found['answer']}")
    assert found["hybrid_tokens"] - found["text_tokens"] == len(slots)
    assert found["hybrid"] in printed
    second = inspect_sample(root / "shards", int(dataset.train.keys[3]), pass_index=1)
    assert (second["pass"], second["split"]) == (1, "train")


def test_inspect_errors(root, copy, tmp_path):
    with pytest.raises(InputError, match="no sample with key 999999"):
        inspect_sample(copy, 999_999)
    worlds.byte_level(vocabulary=500).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="not the tokenizer"):
        inspect_sample(copy, 0, tokenizer=str(tmp_path / "other"))
    info = read_shards_info(copy)
    split, sample = find_sample(copy, info, 5)
    assert (split, sample.key) == ("train", 5)
    index = read_index(copy / "train", read_manifest(copy, "train", info))
    for number in range(len(list((copy / "train").glob("*.tar"))) // 2):  # the first of two passes
        for row in np.flatnonzero(index.shard(number).keys == 5):
            worlds.damage(copy / "train" / f"{number:06d}.tar", int(index.shard(number).offsets[row]) + 40)
    with pytest.raises(InputError, match=r"key 5: altered"):
        find_sample(copy, info, 5)
    worlds.damage(copy / "items.parquet", 100)
    with pytest.raises(InputError, match=r"items.parquet: altered"):
        inspect_sample(copy, 6)
    assert len(matching_tokenizer(info)) == info["vocabulary"]
