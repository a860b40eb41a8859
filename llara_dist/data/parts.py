"""Parts of a build, made on as many machines, and `llara-dist shards merge`, which makes one shards folder of them.

`OUT.parts/00003-of-00016/` holds every 16th shard of each split, from the third on, with their index, items.parquet and
`part.json`, written last. Merging gives the tars a second name in OUT's staging folder, writes indexes, manifests and
shards.json, renames, and removes the parts: killed at any point, it can be run again.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llara_dist import console
from llara_dist.data import shards as form
from llara_dist.data.shard_index import INDEX, IndexFile, IndexWriter
from llara_dist.data.shard_set import report, write_manifest, write_shards_info
from llara_dist.errors import InputError
from llara_dist.integrity import remove_abandoned, sha256_file, staged_folder, write_json

PART = "part.json"
_FOLDER = re.compile(r"(\d{5})-of-(\d{5})")
_SHOWN_PARTS = 8


@dataclass(frozen=True)
class Part:
    """Part `index` (from 0) of `number`."""

    index: int
    number: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read "3/16", the third of sixteen.

        Raises:
            InputError: of another form, or outside 1/n … n/n.
        """
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(f"--part is {text!r}; must be i/n with 1 ≤ i ≤ n ≤ 99999, e.g. 3/16")
        return cls(int(match[1]) - 1, int(match[2]))

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.number}"

    def folder(self, out: Path) -> Path:
        """Where the part of a build into `out` lies."""
        return parts_folder(out) / f"{self.index + 1:05d}-of-{self.number:05d}"


def parts_folder(out: Path) -> Path:
    """Where the parts of a build into `out` lie."""
    return out.with_name(out.name + ".parts")


def find_parts(out: Path) -> list[Part]:
    """The parts that are there, whole or damaged, in order."""
    folder = parts_folder(out)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    matches = [match for match in map(_FOLDER.fullmatch, names) if match]
    return [Part(int(match[1]) - 1, int(match[2])) for match in matches]


def require_same_number(out: Path, part: Part) -> None:
    """Refuse a part beside parts of a build that was cut otherwise.

    Raises:
        InputError: there are parts of another n.
    """
    others = sorted({found.number for found in find_parts(out)} - {part.number})
    if others:
        raise InputError(
            f"{parts_folder(out)}: holds parts of a build in {others[0]} parts; give --part i/{others[0]}, or remove "
            "that folder"
        )


def write_part(
    folder: Path,
    part: Part,
    head: dict[str, Any],
    about: dict[str, Any],
    counts: dict[str, int],
    splits: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Write part.json, the last file of a part; returns it.

    Args:
        folder: the part being made, its shards and items.parquet written.
        part: which.
        head: of the build: data set, tokenizer hash, recipe.
        about: tokenizer, vocabulary and the command that builds a part.
        counts: of the titles.
        splits: per split passes, shards, entry of the index and counts, of this part alone.
    """
    info = form.seal(
        {
            "format_version": form.FORMAT_VERSION,
            "part": part.index + 1,
            "parts": part.number,
            "head": head,
            "about": about,
            "counts": counts,
            "items_sha256": sha256_file(folder / form.ITEMS),
            "splits": splits,
        }
    )
    write_json(folder / PART, info)
    return info


def is_complete(folder: Path, head: dict[str, Any], overwrite: bool) -> bool:
    """Whether a part is there and whole, so that building it again would change nothing.

    Raises:
        InputError: it is of another build, or damaged, and may not be replaced.
    """
    if not folder.exists() or overwrite:
        return False
    info = _read_part(folder)
    remedy = "remove it or give --overwrite true"
    differences = [name for name in head if info["head"].get(name) != head[name]]
    if differences:
        raise InputError(f"{folder}: a part of another build ({', '.join(differences)} differ); {remedy}")
    for split, name, size, _ in _files(info):
        path = folder / split / name
        if not path.is_file() or path.stat().st_size != size:
            raise InputError(f"{path}: missing or not {size} bytes; {remedy}")
    return True


def merge(out: Path, processes: int | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Make one shards folder of the parts that `llara-dist shards build --part i/n` built: the bytes of a whole build.

    Example: llara-dist shards merge shards/out/movielens

    Args:
        out: shards folder to make; its parts lie in OUT.parts and are removed at the end.
        processes: threads that read and hash the shards, all cores by default.
        overwrite: replace an existing shards folder.

    Raises:
        InputError: a part is missing (names the command that builds it), damaged or of another build.
    """
    started = time.perf_counter()
    if processes is not None and processes < 1:
        raise InputError(f"--processes is {processes}; must be at least 1")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(out)
    remove_abandoned(parts_folder(out))
    parts = find_parts(out)
    existing = form.read_shards_info(out) if (out / form.SHARDS).is_file() else None
    if existing is not None and (not parts or _belongs(existing, _read_part(parts[0].folder(out)))):
        _remove_parts(out)
        console.say(f"{out}: merged already")
        return {"out": str(out), **existing}
    if out.exists() and any(out.iterdir()) and (existing is None or not overwrite):
        way = "give --overwrite true" if existing is not None else "it is no shards folder"
        raise InputError(f"{out}: exists already and is of another build than {parts_folder(out)}; {way}")
    infos = _read_parts(out, parts)
    _check_files(out, parts, infos, processes or len(os.sched_getaffinity(0)))
    with staged_folder(out, replace=overwrite) as staging:
        shutil.copyfile(parts[0].folder(out) / form.ITEMS, staging / form.ITEMS)
        entries = {split: _merge_split(staging, out, split, parts, infos) for split in form.SPLITS}
        about = {name: infos[0]["about"][name] for name in ("tokenizer", "vocabulary")}
        info = write_shards_info(staging, infos[0]["head"], about, infos[0]["counts"], entries)
    _remove_parts(out)
    seconds = time.perf_counter() - started
    report(out, info, seconds)
    return {"out": str(out), "seconds": round(seconds, 2), **info}


def _belongs(info: dict[str, Any], part: dict[str, Any]) -> bool:
    return all(info.get(name) == value for name, value in part["head"].items())


def _remove_parts(out: Path) -> None:
    """Remove the parts, all at once as far as anybody sees."""
    folder = parts_folder(out)
    if folder.exists():
        with staged_folder(folder, replace=True):
            pass  # an empty folder takes its place; the old one goes with the staging name
        folder.rmdir()


def _read_part(folder: Path) -> dict[str, Any]:
    path = folder / PART
    if not path.is_file():
        raise InputError(f"{path}: not found; remove {folder} and build that part again")
    return form.parse_sealed(path.read_bytes(), str(path), "a part of a build (`llara-dist shards build --part i/n`)")


def _read_parts(out: Path, parts: list[Part]) -> list[dict[str, Any]]:
    """part.json of every part.

    Raises:
        InputError: parts are missing or are not of one build.
    """
    folder = parts_folder(out)
    if not parts:
        raise InputError(
            f"{folder}: no part is there; build them with `llara-dist shards build … --out {out} --part i/n`"
        )
    numbers = sorted({part.number for part in parts})
    if len(numbers) > 1:
        raise InputError(
            f"{folder}: holds parts of builds in {' and '.join(map(str, numbers))} parts; remove the wrong"
        )
    infos = [_read_part(part.folder(out)) for part in parts]
    for part, info in zip(parts, infos, strict=True):
        different = [name for name in infos[0]["head"] if info["head"].get(name) != infos[0]["head"][name]]
        if different or info["items_sha256"] != infos[0]["items_sha256"]:
            raise InputError(
                f"{part.folder(out)}: of another build than {parts[0].folder(out)} "
                f"({', '.join(different) or 'titles'} differ); remove the wrong one and build it again"
            )
    missing = sorted(set(range(numbers[0])) - {part.index for part in parts})
    if missing:
        named = ", ".join(str(Part(index, numbers[0])) for index in missing[:_SHOWN_PARTS])
        more = f" and {len(missing) - _SHOWN_PARTS} more" if len(missing) > _SHOWN_PARTS else ""
        raise InputError(
            f"{folder}: {len(missing)} of {numbers[0]} parts are missing: {named}{more}; build each, e.g. "
            f"`{infos[0]['about']['command']} --part {Part(missing[0], numbers[0])}`"
        )
    return infos


def _files(info: dict[str, Any]) -> list[tuple[str, str, int, str]]:
    """Split, name, bytes and sha256 of every shard and index of a part."""
    found = []
    for split, written in info["splits"].items():
        found += [(split, shard["name"], shard["bytes"], shard["sha256"]) for shard in written["shards"]]
        found.append((split, INDEX, written["index"]["bytes"], written["index"]["sha256"]))
    return found


def _check_files(out: Path, parts: list[Part], infos: list[dict[str, Any]], threads: int) -> None:
    """Hash every file of every part.

    Raises:
        InputError: one is missing, truncated or altered.
    """
    files = [
        (part, part.folder(out) / split / name, size, sha256, info)
        for part, info in zip(parts, infos, strict=True)
        for split, name, size, sha256 in [*_files(info)]
    ]
    items = [(part.folder(out) / form.ITEMS, info["items_sha256"]) for part, info in zip(parts, infos, strict=True)]
    for path, sha256 in items:
        if not path.is_file() or sha256_file(path) != sha256:
            raise InputError(f"{path}: missing or altered; remove {path.parent} and build that part again")
    with ThreadPoolExecutor(threads) as pool:
        problems = pool.map(lambda file: form.file_problem(*file[1:4]), files)
        for (part, path, _, _, info), problem in zip(
            files, console.progress(problems, "check parts", total=len(files)), strict=True
        ):
            if problem:
                pool.shutdown(cancel_futures=True)
                raise InputError(
                    f"{path}: {problem}; remove {part.folder(out)} and build it again with "
                    f"`{info['about']['command']} --part {part}`"
                )


def _merge_split(
    staging: Path, out: Path, split: str, parts: list[Part], infos: list[dict[str, Any]]
) -> dict[str, Any]:
    """Bring the shards of a split together; returns its entry in shards.json."""
    (staging / split).mkdir()
    written = [info["splits"][split] for info in infos]
    indexes = [
        IndexFile(part.folder(out) / split / INDEX, {"index": one["index"], "shards": one["shards"]})
        for part, one in zip(parts, written, strict=True)
    ]
    index, shards = IndexWriter(staging / split / INDEX), []
    for number in range(sum(len(one["shards"]) for one in written)):
        place, part = divmod(number, len(parts))
        shard = written[part]["shards"][place]
        _link(parts[part].folder(out) / split / shard["name"], staging / split / shard["name"])
        index.write(indexes[part].shard(place))
        shards.append(shard)
    merged = {
        "passes": written[0]["passes"],
        "shards": shards,
        "index": index.close(),
        "longest_row_tokens": max(one["longest_row_tokens"] for one in written),
        **{
            name: sum(one[name] for one in written)
            for name in ("tokens", "rows_with_history_dropped", "history_items_dropped")
        },
    }
    return write_manifest(staging, split, infos[0]["head"], merged)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
