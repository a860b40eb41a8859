"""`llara-dist shards verify`: read every byte and say what is missing, truncated or altered, and where."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from llara_dist import console
from llara_dist.data import shards as form
from llara_dist.data.shard_index import INDEX, IndexFile
from llara_dist.errors import InputError
from llara_dist.integrity import sha256_bytes

_SHOWN_FINDINGS = 100
_SHOWN_SAMPLES = 5
"""damaged samples listed one by one in a shard; the rest are counted"""


def verify(shards: Path, processes: int | None = None) -> dict[str, Any]:
    """Check a shards folder: manifests and indexes against their hashes, every shard's sha256, every sample's crc32.

    Example: llara-dist shards verify shards/out/movielens

    Args:
        shards: shards folder, made by `llara-dist shards build`.
        processes: threads that read and hash, all cores by default.

    Raises:
        InputError: there is damage; every finding is printed before.
    """
    shards = Path(shards)
    info = form.read_shards_info(shards)
    problems: list[str] = []
    problem = form.file_problem(shards / form.ITEMS, info["items_bytes"], info["items_sha256"])
    if problem:
        problems.append(f"{shards / form.ITEMS}: {problem}")
    jobs: list[Callable[[], list[str]]] = []
    samples = num_shards = 0
    for split in info["splits"]:
        try:
            manifest = form.read_manifest(shards, split, info)
        except InputError as error:
            # Without the manifest there is nothing to hold this split's files against.
            problems.append(str(error))
            continue
        problems += unexpected_files(shards / split, manifest)
        try:
            index = form.read_index(shards / split, manifest)
            problems += index_problems(shards / split, manifest)
        except InputError as error:
            problems.append(str(error))
            index = None
        samples += manifest["samples"]
        num_shards += len(manifest["shards"])
        jobs += [partial(shard_problems, shards / split, manifest, index, n) for n in range(len(manifest["shards"]))]
    for found in console.progress(_run(jobs, processes), "verify shards", total=len(jobs)):
        problems += found
    if problems:
        for problem in problems[:_SHOWN_FINDINGS]:
            console.say(problem)
        if len(problems) > _SHOWN_FINDINGS:
            console.say(f"… and {len(problems) - _SHOWN_FINDINGS} more")
        raise InputError(f"{shards}: {len(problems)} findings; first: {problems[0]}; rebuild with `shards build`")
    console.say(f"{shards}: {samples:,} samples in {num_shards} shards, all as built")
    return {"shards": str(shards), "ok": True, "samples": samples, "num_shards": num_shards, "hash": info["hash"]}


def _run(jobs: list[Callable[[], list[str]]], threads: int | None) -> Iterator[list[str]]:
    """Run the jobs on threads (hashing releases the interpreter's lock); findings in the order of the jobs."""
    if threads is not None and threads < 1:
        raise InputError(f"--processes is {threads}; must be at least 1")
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(lambda job: job(), jobs)


def unexpected_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Files in a shard set's folder that its manifest does not name."""
    known = {shard["name"] for shard in manifest["shards"]} | {INDEX, form.MANIFEST}
    return [
        f"{path}: unexpected, the manifest does not name it"
        for path in sorted(folder.iterdir())
        if path.name not in known
    ]


def shard_problems(folder: Path, manifest: dict[str, Any], index: IndexFile | None, number: int) -> list[str]:
    """Findings in one shard: the file's, and if it is damaged the damaged samples' with offset and key."""
    entry = manifest["shards"][number]
    path = folder / entry["name"]
    problem = form.file_problem(path, entry["bytes"], entry["sha256"])
    # A shard with the manifest's sha256 still has to be the one that the index describes.
    findings = [] if problem is None else [f"{path}: {problem}"]
    if problem == "missing" or index is None:
        return findings
    try:
        rows = index.shard(number)
    except InputError:
        return findings  # said already, of the index
    damaged = []
    with open(path, "rb") as file:
        for key, offset, size, crc32 in zip(
            rows.keys.tolist(), rows.offsets.tolist(), rows.sizes.tolist(), rows.crc32.tolist(), strict=True
        ):
            file.seek(offset)
            wrong = form.payload_problem(file.read(size), size, crc32)
            if wrong:
                damaged.append(f"{path}: sample at offset {offset}, key {key}: {wrong}")
    findings += damaged[:_SHOWN_SAMPLES]
    if len(damaged) > _SHOWN_SAMPLES:
        findings.append(f"{path}: {len(damaged)} of its {len(rows)} samples are damaged, the first are listed above")
    if problem is not None and not damaged:
        findings[0] += " (no sample is affected: the damage is in a tar header or in padding)"
    return findings


def index_problems(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Which parts of a damaged index are damaged: one record batch a shard."""
    path, entry = folder / INDEX, manifest["index"]
    problem = form.file_problem(path, entry["bytes"], entry["sha256"])
    if problem is None:
        return []
    data = path.read_bytes()
    return [f"{path}: {problem}"] + [
        f"{path}: altered in the record batch of shard {manifest['shards'][number]['name']}"
        for number, batch in enumerate(entry["record_batches"])
        if sha256_bytes(data[batch["offset"] : batch["offset"] + batch["bytes"]]) != batch["sha256"]
    ]
