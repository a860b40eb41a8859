"""Random damage to any file of a shards folder: verify names it, and reading stops or gives exactly what was built."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from llara_dist.data.repair import repair
from llara_dist.data.samples import Sample, pack
from llara_dist.data.verify import verify
from llara_dist.errors import InputError
from llara_dist.stream.reader import ShardSet

from . import worlds

SPLITS = ("train", "val", "test")
OUTCOMES = ("stops at open", "stops at read", "harmless, verify finds it", "bytes unchanged")


@dataclass(frozen=True)
class World:
    """A shards folder, what is in it, and the same once more to be damaged."""

    root: Path
    copy: Path
    files: dict[str, bytes]
    samples: dict[str, list[bytes]]
    """by split, every sample in order"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    root = worlds.write_shards(tmp_path_factory.mktemp("mutations"))
    shutil.copytree(root / "shards", root / "copy")
    samples = {split: read(root / "shards", split, lambda: None) for split in SPLITS}
    return World(root, root / "copy", worlds.files(root / "shards"), samples)


def read(shards: Path, split: str, opened: Callable[[], None]) -> list[bytes]:
    """Every sample of a split as training reads it, packed again; `opened` is called between opening and reading."""
    files = ShardSet.open(shards, split)
    opened()
    try:
        samples: list[Sample] = files.read(range(len(files)))
        info = files.all
        for number, sample in enumerate(samples):
            assert info.keys[number] == sample.key
            assert info.tokens[number] == len(sample.tokens)
            assert info.slots[number] == len(sample.slot_items)
            assert info.answer_tokens[number] == sample.answer_end - sample.answer_start
        return [pack(sample) for sample in samples]
    finally:
        files.close()


# Mutations: each damages a folder in place and returns the files that it touched.


def span(data: bytes | bytearray, draw: random.Random, longest: int = 2048) -> slice:
    start = draw.randrange(len(data))
    return slice(start, min(len(data), start + draw.randint(1, longest)))


def cut(data: bytearray, draw: random.Random) -> bytearray:
    return data[: draw.randrange(len(data))]


def flip(data: bytearray, draw: random.Random) -> bytearray:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def zero(data: bytearray, draw: random.Random) -> bytearray:
    part = span(data, draw)
    data[part] = bytes(part.stop - part.start)
    return data


def swap_ranges(data: bytearray, draw: random.Random) -> bytearray:
    length = draw.randint(1, min(2048, len(data) // 2))
    first = draw.randint(0, len(data) - 2 * length)
    second = draw.randint(first + length, len(data) - length)
    one, other = data[first : first + length], data[second : second + length]
    data[first : first + length], data[second : second + length] = other, one
    return data


def append(data: bytearray, draw: random.Random) -> bytearray:
    tail = draw.choice([b"\n", bytes(512), draw.randbytes(draw.randint(1, 2000)), bytes(data[span(data, draw)])])
    return data + tail


INSIDE = {"cut": cut, "flip": flip, "zero": zero, "swap ranges": swap_ranges, "append": append}


def swap_files(shards: Path, file: str, other: str) -> set[str]:
    one, two = (shards / file).read_bytes(), (shards / other).read_bytes()
    (shards / file).write_bytes(two)
    (shards / other).write_bytes(one)
    return {file, other}


def duplicate_over(shards: Path, file: str, other: str) -> set[str]:
    shutil.copyfile(shards / file, shards / other)
    return {other}


def rename_over(shards: Path, file: str, other: str) -> set[str]:
    (shards / file).replace(shards / other)
    return {file, other}


BETWEEN = {"swap files": swap_files, "duplicate over": duplicate_over, "rename over": rename_over}


def new_name(file: str, draw: random.Random, files: dict[str, bytes]) -> str:
    """A name that no file has, of the kind that a slip or a tool leaves behind."""
    path = Path(file)
    names = [
        f"{path}.bak",
        str(path.with_name(f"{draw.randrange(10**6):06d}.tar")),
        str(path.with_name("x" + path.name)),
    ]
    return draw.choice([name for name in names if name not in files])


def duplicate(shards: Path, file: str, name: str) -> set[str]:
    shutil.copyfile(shards / file, shards / name)
    return {name}


def rename(shards: Path, file: str, name: str) -> set[str]:
    (shards / file).rename(shards / name)
    return {file, name}


ASIDE = {"duplicate": duplicate, "rename": rename}
MUTATIONS = [*INSIDE, *BETWEEN, *ASIDE, "remove"]


def kind(file: str) -> str:
    path = Path(file)
    return "shard" if path.suffix == ".tar" else path.name


def choose(files: dict[str, bytes], draw: random.Random) -> str:
    """A file: first its kind, so that the few small ones are not lost among the shards."""
    wanted = draw.choice(
        ["shard", "shard", "index.arrow", "index.arrow", "manifest.json", "shards.json", "items.parquet"]
    )
    return draw.choice([file for file in files if kind(file) == wanted])


def mutate(shards: Path, files: dict[str, bytes], mutation: str, file: str, draw: random.Random) -> set[str]:
    """Damage a folder; returns the files that it touched, whether or not their bytes are others now."""
    if mutation in INSIDE:
        (shards / file).write_bytes(INSIDE[mutation](bytearray(files[file]), draw))
        return {file}
    if mutation in BETWEEN:
        return BETWEEN[mutation](shards, file, draw.choice([other for other in files if other != file]))
    if mutation in ASIDE:
        return ASIDE[mutation](shards, file, new_name(file, draw, files))
    (shards / file).unlink()
    return {file}


def restore(world: World, touched: set[str]) -> None:
    for file in touched:
        if file in world.files:
            (world.copy / file).write_bytes(world.files[file])
        else:
            (world.copy / file).unlink()


def stops(error: InputError, copy: Path, touched: set[str]) -> None:
    """An error of a read: one line that names a file that was touched."""
    assert "\n" not in str(error)
    assert any(f"{copy / file}:" in str(error) for file in touched), (str(error), touched)


def outcome(world: World, touched: set[str]) -> str:
    """What verify and a reader make of the damaged copy; anything but what is promised fails."""
    changed = {file for file in touched if contents(world.copy / file) != world.files.get(file)}
    if not changed:
        assert verify(world.copy, processes=1)["ok"]
        return OUTCOMES[3]
    with pytest.raises(InputError) as caught:
        verify(world.copy, processes=1)
    assert "\n" not in str(caught.value)
    assert caught.value.result is not None
    found = {finding["file"] for finding in caught.value.result["findings"]}
    assert found
    assert found <= changed, "verify accuses a whole file"
    if not {kind(file) for file in changed} & {"manifest.json", "shards.json"}:
        assert found == changed, "a damaged file is not named"
    at = None
    for split in SPLITS:
        opened: list[bool] = []
        try:
            assert read(world.copy, split, lambda opened=opened: opened.append(True)) == world.samples[split]
        except InputError as error:
            stops(error, world.copy, touched)
            at = OUTCOMES[0] if not opened else at or OUTCOMES[1]
    return at or OUTCOMES[2]


def contents(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def plain_webdataset(path: Path) -> list[tuple[str, bytes]]:
    """The records that stock webdataset gives for one tar: the stages of a `WebDataset`, on a file that we close."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with open(path, "rb") as file:
        records = group_by_keys(tar_file_expander([{"url": str(path), "stream": file}]))
        return [(record["__key__"], record.get("mp", b"")) for record in records]


def run(world: World, count: int, seed: int, repair_every: int) -> None:
    """Do `count` mutations, hold each to its promise, and print what became of them."""
    draw = random.Random(seed)
    outcomes: Counter[tuple[str, str, str]] = Counter()
    webdataset: Counter[str] = Counter()
    repaired = 0
    plain = {file: plain_webdataset(world.copy / file) for file in world.files if kind(file) == "shard"}
    for number in range(count):
        mutation, file = MUTATIONS[number % len(MUTATIONS)], choose(world.files, draw)
        touched = mutate(world.copy, world.files, mutation, file, draw)
        try:
            became = outcome(world, touched)
            outcomes[kind(file), mutation, became] += 1
            if mutation in INSIDE and kind(file) == "shard" and became != OUTCOMES[3]:
                try:
                    same = plain_webdataset(world.copy / file) == plain[file]
                    webdataset["same samples" if same else "silently fewer samples or other bytes"] += 1
                except Exception:  # whatever it raises, it is not silent
                    webdataset["an error"] += 1
            if repair_every and number % repair_every == 0 and became != OUTCOMES[3]:
                repair(world.copy, world.root / "data", tokenizer=str(world.root / "tokenizer"), processes=1)
                found = worlds.files(world.copy)
                assert {name: found.get(name) for name in world.files} == world.files
                repaired += 1
        except BaseException:
            print(f"mutation {number} of seed {seed}: {mutation} of {file}, touched {sorted(touched)}")
            raise
        finally:
            restore(world, touched)
    assert worlds.files(world.copy) == world.files
    assert sum(outcomes.values()) == count
    report(outcomes, webdataset, count, seed, repaired)
    assert webdataset["silently fewer samples or other bytes"] > 0, "nothing that webdataset lets pass was tested"


def report(outcomes: Counter, webdataset: Counter, count: int, seed: int, repaired: int) -> None:
    print(f"\n{count} mutations, seed {seed}; {repaired} of them also repaired, byte for byte")
    print(f"{'file':<15}{'mutation':<16}" + "".join(f"{name:>27}" for name in OUTCOMES))
    for file in sorted({file for file, _, _ in outcomes}):
        for mutation in MUTATIONS:
            cells = [outcomes[file, mutation, name] for name in OUTCOMES]
            if sum(cells):
                print(f"{file:<15}{mutation:<16}" + "".join(f"{cell:>27}" for cell in cells))
    totals = [sum(number for key, number in outcomes.items() if key[2] == name) for name in OUTCOMES]
    print(f"{'all':<31}" + "".join(f"{cell:>27}" for cell in totals))
    inside = sum(webdataset.values())
    print(f"plain webdataset on the {inside} tars damaged inside: {dict(webdataset)}")


def test_a_hundred_mutations(world):
    run(world, 110, seed=1, repair_every=0)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_more_than_a_thousand_mutations(world):
    run(world, 1100, seed=2, repair_every=7)


@pytest.mark.parametrize("wanted", ["shard", "index.arrow"])
def test_damage_after_opening_is_found_when_it_is_read(world, wanted):
    """Between opening and the first look at the index or a shard: the same promise, and no crash of a memory map."""
    draw = random.Random(3)
    candidates = [file for file in world.files if kind(file) == wanted and file.startswith("train/")]
    stopped = 0
    for number in range(60):
        mutation, file = [*INSIDE, "remove"][number % 6], draw.choice(candidates)
        touched: set[str] = set()

        def damage(mutation: str = mutation, file: str = file, touched: set[str] = touched) -> None:
            touched |= mutate(world.copy, world.files, mutation, file, draw)

        try:
            assert read(world.copy, "train", damage) == world.samples["train"]
        except InputError as error:
            stops(error, world.copy, {file})
            stopped += 1
        finally:
            restore(world, touched)
    assert stopped > 20
