"""A build in parts: merged, the bytes of one machine's build; what is missing, damaged or of another build is named."""

from __future__ import annotations

import glob
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from llara_dist import integrity
from llara_dist.cli import find_command, run_command
from llara_dist.data import placement
from llara_dist.data.build import build
from llara_dist.data.parts import Part, merge, parts_folder
from llara_dist.data.shards import read_shards_info
from llara_dist.data.verify import verify
from llara_dist.errors import InputError
from llara_dist.integrity import remove_abandoned, staged_folder

from . import worlds

SETTINGS = {"passes": 2, "processes": 1, "samples_per_shard": 30}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    worlds.write_world(root / "data", num_users=40)
    worlds.byte_level().save_pretrained(root / "tokenizer")
    make(root, root / "whole")
    return root


def make(root: Path, out: Path, **settings) -> dict:
    return build(root / "data", str(root / "tokenizer"), out, **{**SETTINGS, **settings})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("number", [1, 3, 50])
def test_merged_parts_are_one_machines_build(root: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    for part in reversed(range(number)):
        make(root, out, part=f"{part + 1}/{number}", processes=1 + part % 2)
    assert not out.exists()
    info = merge(out)
    assert info["hash"] == read_shards_info(root / "whole")["hash"]
    assert files(out) == files(root / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert merge(out)["hash"] == info["hash"]  # once more changes nothing
    assert files(out) == files(root / "whole")


def test_bytes_do_not_depend_on_waves(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_ROWS_PER_WAVE", 60)
    monkeypatch.setattr(placement, "_KEYS_PER_CHUNK", 17)
    make(root, tmp_path / "out")
    assert files(tmp_path / "out") == files(root / "whole")


def test_shard_size_decides_the_number_of_samples(root: Path, tmp_path: Path) -> None:
    info = make(root, tmp_path / "default", samples_per_shard=None)
    assert {split["shards"] for split in info["splits"].values()} == {1, 2}  # two passes of one shard
    per_shard = info["recipe"]["samples_per_shard"]
    member = info["splits"]["train"]["bytes"] / info["splits"]["train"]["samples"]
    assert abs(per_shard * member / 2**28 - 1) < 0.05
    make(root, tmp_path / "given", samples_per_shard=per_shard, processes=2)
    assert files(tmp_path / "given") == files(tmp_path / "default")
    with pytest.raises(InputError, match="--shard_mib is 0"):
        make(root, tmp_path / "none", shard_mib=0)


def test_a_complete_part_is_left_alone(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    make(root, out, part="1/2")
    folder = Part(0, 2).folder(out)
    tar = folder / "train/000002.tar"
    written = tar.stat().st_mtime_ns
    capsys.readouterr()
    make(root, out, part="1/2")
    assert "complete already, left alone" in capsys.readouterr().out
    assert tar.stat().st_mtime_ns == written
    with pytest.raises(InputError, match=r"00001-of-00002: a part of another build \(recipe differ\)"):
        make(root, out, part="1/2", seed=1)
    with pytest.raises(InputError, match=r"holds parts of a build in 2 parts; give --part i/2"):
        make(root, out, part="1/3")
    tar.write_bytes(b"")
    with pytest.raises(InputError, match=r"train/000002.tar: missing or not \d+ bytes; .*--overwrite true"):
        make(root, out, part="1/2")
    make(root, out, part="1/2", overwrite=True)
    make(root, out, part="2/2")
    merge(out)
    assert files(out) == files(root / "whole")


def test_merge_names_what_is_missing_or_damaged(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"out.parts: no part is there; build them with"):
        merge(out)
    for part in ("1/4", "3/4"):
        make(root, out, part=part)
    with pytest.raises(InputError, match=r"2 of 4 parts are missing: 2/4, 4/4; build each, .* --part 2/4`"):
        merge(out)
    for part in ("2/4", "4/4"):
        make(root, out, part=part)
    before = files(parts_folder(out))
    for name, problem in (
        ("train/000001.tar", "altered"),
        ("train/index.arrow", "altered"),
        ("items.parquet", "altered"),
        ("part.json", "altered|not JSON"),
    ):
        path = Part(1, 4).folder(out) / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x20
        path.write_bytes(data)
        with pytest.raises(InputError, match=f"{name}: .*({problem})") as caught:
            merge(out)
        assert "\n" not in str(caught.value)
        data[len(data) // 2] ^= 0x20
        path.write_bytes(data)
    assert not out.exists()
    assert files(parts_folder(out)) == before
    shutil.rmtree(Part(3, 4).folder(out))
    make(root, tmp_path / "other", part="4/4", seed=1)
    shutil.copytree(Part(3, 4).folder(tmp_path / "other"), Part(3, 4).folder(out))
    with pytest.raises(InputError, match=r"00004-of-00004: of another build than .*\(recipe differ\)"):
        merge(out)


def test_merge_replaces_another_build_only_when_told(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(root, out, seed=1)
    with pytest.raises(InputError, match="exists already"):
        make(root, out, part="1/1")
    make(root, out, part="1/1", overwrite=True)
    with pytest.raises(InputError, match="is of another build"):
        merge(out)
    merge(out, overwrite=True)
    assert files(out) == files(root / "whole")
    assert not parts_folder(out).exists()


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "a/b", "-1/4", "1/0"])
def test_bad_parts(root: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"--part is .*; must be i/n"):
        make(root, tmp_path / "out", part=text)


def test_merge_from_the_command_line(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(root, out, part="1/1")
    run_command(*find_command(["shards", "merge", str(out)]))
    assert files(out) == files(root / "whole")


def test_folders_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    machine = integrity._machine()
    left = [tmp_path / f".out.{machine}-{dead.pid}.{kind}" for kind in ("staging", "retired")]
    kept = [tmp_path / f".out.elsewhere-{dead.pid}.staging", tmp_path / f".other.{machine}-{dead.pid}.staging"]
    living = tmp_path / f".out.{machine}-{subprocess.os.getppid()}.staging"
    for folder in (*left, *kept, living):
        folder.mkdir()
    with staged_folder(tmp_path / "out") as staging:
        (staging / "new").touch()
    # The folder that had been replaced was given its name back before the new one took its place.
    assert sorted(tmp_path.iterdir()) == sorted([*kept, living, tmp_path / "out"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    left[1].mkdir()
    shutil.rmtree(tmp_path / "out")
    remove_abandoned(tmp_path / "out")
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("can_exchange", [True, False])
def test_replacing_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(integrity, "_exchange", lambda one, other: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with staged_folder(tmp_path / "out", replace=True) as staging:
        (staging / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


BUILD = "import sys; from llara_dist.data.build import build; build(*sys.argv[1:4], **eval(sys.argv[4]))"
MERGE = "import sys; from llara_dist.data.parts import merge; merge(sys.argv[3])"


def run(root: Path, out: Path, script: str, settings: dict, kill_after: float | None = None) -> tuple[bool, float]:
    """Run a build or merge; kill it so many seconds after it made its staging folder.

    Returns:
        Whether it was killed, and how long it lived from its staging folder on.
    """
    command = [sys.executable, "-c", script, str(root / "data"), str(root / "tokenizer"), str(out), repr(settings)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    folders = [glob.escape(str(folder)) for folder in (out.parent, parts_folder(out))]
    while process.poll() is None and not any(glob.glob(f"{folder}/.*-{process.pid}.staging") for folder in folders):
        time.sleep(0.001)
    started = time.monotonic()
    try:
        process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    return process.returncode != 0, time.monotonic() - started


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_killed_50_times(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL at random points of builds, part builds and merges: nothing damaged under a final name, ever."""
    chance = random.Random(0)
    settings = {**SETTINGS, "processes": 2, "overwrite": True}
    killed, found = Counter(), Counter()

    out = tmp_path / "whole" / "out"
    out.parent.mkdir()
    _, lasts = run(root, out, BUILD, settings)
    shutil.rmtree(out)
    while killed["build"] < 25:
        if killed["build"] % 2 and out.exists():
            shutil.rmtree(out)  # every other build makes its folder, the others replace it
        was_there = out.exists()
        again = {**settings, "seed": killed["build"] % 2}
        was_killed, lasted = run(root, out, BUILD, again, chance.uniform(0, lasts))
        killed["build"] += was_killed
        lasts = lasts if was_killed else min(lasts, lasted)  # the first one may have had to wait for a core
        if out.exists():
            assert verify(out)["ok"]
            found["whole shards folder after a killed build"] += 1
        assert out.exists() or not was_there, "what was to be replaced is gone"
    run(root, out, BUILD, settings)
    assert files(out) == files(root / "whole")
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    out = tmp_path / "parts" / "out"
    while killed["part"] < 13:
        part = Part(killed["part"] % 3, 3)
        killed["part"] += run(root, out, BUILD, {**settings, "part": str(part)}, chance.uniform(0, 0.8 * lasts))[0]
        if part.folder(out).exists():
            found["whole part after a killed build of it"] += 1
            make(root, out, part=str(part))  # says so where it is not whole
    lasts = 0.0
    while killed["merge"] < 12:
        for index in range(3):
            make(root, out, part=f"{index + 1}/3")
        was_killed, lasted = run(root, out, MERGE, {}, chance.uniform(0, lasts) if lasts else None)
        killed["merge"] += was_killed
        lasts = lasts if was_killed else min(lasts or lasted, lasted)
        if out.exists():
            assert verify(out)["ok"]
            found["whole shards folder after a killed merge"] += was_killed
        merge(out)
        assert files(out) == files(root / "whole")
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        shutil.rmtree(out)
    with capsys.disabled():
        print(f"\nkilled: {dict(killed)}; found: {dict(found)}")
