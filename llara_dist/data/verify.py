"""`llara-dist shards verify`: read every byte and say what is missing, truncated or altered, and where."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist import console
from llara_dist.data import shards as form
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
        except InputError as error:
            problems += [str(error), *row_group_problems(shards / split, manifest)]
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
    known = {shard["name"] for shard in manifest["shards"]} | {form.INDEX, form.MANIFEST}
    return [
        f"{path}: unexpected, the manifest does not name it"
        for path in sorted(folder.iterdir())
        if path.name not in known
    ]


def shard_problems(folder: Path, manifest: dict[str, Any], index: form.Index | None, number: int) -> list[str]:
    """Findings in one shard: the file's, and if it is damaged the damaged samples' with offset and key."""
    entry = manifest["shards"][number]
    path = folder / entry["name"]
    problem = form.file_problem(path, entry["bytes"], entry["sha256"])
    # A shard with the manifest's sha256 still has to be the one that the index describes.
    findings = [] if problem is None else [f"{path}: {problem}"]
    if problem == "missing" or index is None:
        return findings
    rows = np.arange(*np.searchsorted(index.shards, [number, number + 1]))
    damaged = []
    with open(path, "rb") as file:
        for row in rows.tolist():
            file.seek(int(index.offsets[row]))
            wrong = form.payload_problem(file.read(int(index.sizes[row])), int(index.sizes[row]), int(index.crc32[row]))
            if wrong:
                damaged.append(f"{path}: sample at offset {index.offsets[row]}, key {index.keys[row]}: {wrong}")
    findings += damaged[:_SHOWN_SAMPLES]
    if len(damaged) > _SHOWN_SAMPLES:
        findings.append(f"{path}: {len(damaged)} of its {len(rows)} samples are damaged, the first are listed above")
    if len(rows) != entry["samples"]:
        findings.append(f"{path}: the index lists {len(rows)} samples, the manifest {entry['samples']}")
    if problem is not None and not damaged:
        findings[0] += " (no sample is affected: the damage is in a tar header or in padding)"
    return findings


def row_group_problems(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Which parts of a damaged index are damaged: one row group a shard."""
    path = folder / form.INDEX
    if not path.is_file():
        return []
    data = path.read_bytes()
    return [
        f"{path}: altered in the row group of shard {manifest['shards'][number]['name']}"
        for number, group in enumerate(manifest["index"]["row_groups"])
        if sha256_bytes(data[group["offset"] : group["offset"] + group["bytes"]]) != group["sha256"]
    ]
