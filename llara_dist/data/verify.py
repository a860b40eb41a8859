"""`llara-dist shards verify`: read every byte and say what is missing, truncated, altered, foreign or unexpected."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llara_dist import console
from llara_dist.data import shards as form
from llara_dist.data.damage import Finding, check_file, check_index, check_shard
from llara_dist.data.records import identity_of
from llara_dist.data.shard_index import INDEX
from llara_dist.errors import InputError
from llara_dist.integrity import json_text

REPAIR_STAGING = ".repair.staging"
"""where `shards repair` writes, inside the shards folder; left behind only by one that was killed"""
_SHOWN_FINDINGS = 100
_SHOWN_SAMPLES = 5
"""damaged samples printed one by one of a shard, whose own line counts them; --json names more of them"""


@dataclass(frozen=True)
class Survey:
    """What a shards folder holds and what is wrong with it."""

    shards: Path
    info: dict[str, Any] | None
    """shards.json, None where it is damaged"""
    manifests: dict[str, dict[str, Any]]
    """by split; only those that are whole and, as far as shards.json can tell, of this build"""
    splits: list[str]
    findings: list[Finding]

    @property
    def samples(self) -> int:
        """Samples that the manifests name."""
        return sum(manifest["samples"] for manifest in self.manifests.values())

    @property
    def num_shards(self) -> int:
        """Shards that the manifests name."""
        return sum(len(manifest["shards"]) for manifest in self.manifests.values())

    def record(self) -> dict[str, Any]:
        """The JSON object that `verify` gives."""
        return {
            "shards": str(self.shards),
            "ok": not self.findings,
            "samples": self.samples,
            "num_shards": self.num_shards,
            "hash": self.info["hash"] if self.info else None,
            "findings": [asdict(finding) for finding in self.findings],
        }


def verify(shards: Path, processes: int | None = None) -> dict[str, Any]:
    """Check a shards folder: every file against its recorded hash, every sample's crc32, and what does not belong.

    Example: llara-dist shards verify shards/out/movielens

    Args:
        shards: shards folder, made by `llara-dist shards build`.
        processes: threads that read and hash, all cores by default.

    Raises:
        InputError: there is damage; every finding is printed before.
    """
    found = survey(Path(shards), processes)
    if not found.findings:
        console.say(f"{shards}: {found.samples:,} samples in {found.num_shards} shards, all as built")
        return found.record()
    say_findings(found)
    files = len({finding.file for finding in found.findings})
    if all(finding.kind == "unexpected" for finding in found.findings):
        remedy = "all that was built is whole; move away what does not belong there"
    else:
        remedy = f"run `llara-dist shards repair {shards} --data DATA`"
    raise InputError(
        f"{shards}: {len(found.findings)} findings in {files} files; first: {found.findings[0].line(found.shards)}; "
        f"{remedy}",
        result=found.record(),
    )


def say_findings(found: Survey) -> None:
    """Print the findings, a line each; of a shard's many damaged samples the first few."""
    lines: list[str] = []
    samples: Counter[str] = Counter()
    for finding in found.findings:
        if finding.key is not None:
            samples[finding.file] += 1
            if samples[finding.file] > _SHOWN_SAMPLES:
                continue
        lines.append(finding.line(found.shards))
    for line in lines[:_SHOWN_FINDINGS]:
        console.say(line)
    if len(lines) > _SHOWN_FINDINGS:
        console.say(f"… and {len(lines) - _SHOWN_FINDINGS} more")


def survey(shards: Path, threads: int | None = None, only: Collection[str] | None = None) -> Survey:
    """Look at everything in a shards folder.

    Where shards.json is damaged, each manifest is held against its own hash and the rest against the manifests.
    Where a manifest is damaged, nothing says what its tars and its index must be: they are checked for being there.

    Args:
        shards: shards folder.
        threads: that read and hash; all cores by default.
        only: files (paths inside the folder) whose content is read, all by default; manifests are always read.

    Raises:
        InputError: no shards folder at all.
    """
    if threads is not None and threads < 1:
        raise InputError(f"--processes is {threads}; must be at least 1")
    findings: list[Finding] = []
    if not any((shards / name).exists() for name in (form.SHARDS, *form.SPLITS)):
        form.read_shards_info(shards)  # says what was expected
    info = _record(shards, form.SHARDS, form.parse_shards_info, findings)
    splits: list[str] = list(form.SPLITS if info is None else info["splits"])
    manifests: dict[str, dict[str, Any]] = {}
    for split in splits:
        manifest = _manifest(shards, split, info, manifests, findings)
        if manifest is not None:
            manifests[split] = manifest
    findings += _names(shards, splits, info, manifests)
    jobs = _jobs(shards, info, manifests, only)
    for found in console.progress(_run(jobs, threads), "check shards", total=len(jobs)):
        findings += found
    return Survey(shards, info, manifests, splits, findings)


def check_shard_set(shards: Path, split: str, manifest: dict[str, Any], threads: int | None) -> list[Finding]:
    """Findings in one split's index and tars, held against a manifest."""
    jobs = _jobs(shards, None, {split: manifest}, None)
    return [finding for found in _run(jobs, threads) for finding in found]


def _record(
    shards: Path, file: str, parse: Callable[[bytes, str], dict[str, Any]], findings: list[Finding]
) -> dict[str, Any] | None:
    """A sealed JSON file; None and a finding where its content is damaged or it is not there."""
    path, split = shards / file, Path(file).parent.name or None
    if not path.is_file():
        there = os.path.lexists(path)
        detail = "altered, it is no regular file" if there else "missing"
        findings.append(Finding(file, "altered" if there else "missing", detail, split))
        return None
    try:
        data = path.read_bytes()
        value = parse(data, str(path))
    except OSError as error:
        findings.append(Finding(file, "altered", f"altered, it cannot be read ({error.strerror})", split))
        return None
    except InputError as error:
        # The reader's own words, without the path before and the remedy after them.
        reason = str(error).removeprefix(f"{path}: ").partition(";")[0]
        findings.append(Finding(file, "altered", f"altered: {reason.removeprefix('altered, ')}", split))
        return None
    if data != json_text(value).encode():
        detail = "altered in white space alone; what it says is as built"
        findings.append(Finding(file, "altered", detail, split))
    return value


def _manifest(
    shards: Path,
    split: str,
    info: dict[str, Any] | None,
    others: dict[str, dict[str, Any]],
    findings: list[Finding],
) -> dict[str, Any] | None:
    """A split's manifest if it is whole and of this build, else None and a finding."""
    file = f"{split}/{form.MANIFEST}"
    manifest = _record(shards, file, lambda data, shown: form.parse_sealed(data, shown, "a manifest"), findings)
    if manifest is None:
        return None
    problem = None
    if manifest.get("split") != split:
        problem = f"it is {form.SHARDS if 'splits' in manifest else 'the manifest of ' + repr(manifest.get('split'))}"
    elif info is not None and manifest["hash"] != info["splits"][split]["hash"]:
        problem = f"it belongs to another build than {form.SHARDS}"
    elif info is None and any(identity_of(manifest) != identity_of(other) for other in others.values()):
        problem = f"it belongs to another build than {next(iter(others))}/{form.MANIFEST}"
    if problem is None:
        return manifest
    findings.append(Finding(file, "foreign", f"foreign, {problem}", split))
    return None


def _names(
    shards: Path, splits: list[str], info: dict[str, Any] | None, manifests: dict[str, dict[str, Any]]
) -> list[Finding]:
    """What lies in the folder and should not; and what should where no manifest can say more."""
    findings = [
        Finding(
            path.name,
            "unexpected",
            "unexpected, left by a repair that was interrupted; run it again"
            if path.name == REPAIR_STAGING
            else "unexpected, no part of a shards folder",
        )
        for path in sorted(shards.iterdir())
        if path.name not in {form.SHARDS, form.ITEMS, *splits}
    ]
    if info is None and not (shards / form.ITEMS).exists():
        findings.append(Finding(form.ITEMS, "missing", "missing"))
    for split in splits:
        if split in manifests:
            count = len(manifests[split]["shards"])
        else:
            count = None if info is None else info["splits"][split]["shards"]
        present = {path.name for path in (shards / split).iterdir()} if (shards / split).is_dir() else set()
        tars = {form.shard_name(number) for number in range(count or 0)}
        if split not in manifests:
            findings += [
                Finding(f"{split}/{name}", "missing", "missing", split, name if name in tars else None)
                for name in sorted((tars | {INDEX}) - present)
            ]
        if count is not None:
            findings += [
                Finding(f"{split}/{name}", "unexpected", "unexpected, the manifest does not name it", split)
                for name in sorted(present - tars - {INDEX, form.MANIFEST})
            ]
    return findings


def _jobs(
    shards: Path, info: dict[str, Any] | None, manifests: dict[str, dict[str, Any]], only: Collection[str] | None
) -> list[Callable[[], list[Finding]]]:
    """The readings to do, in the order in which they are reported."""
    known = {shard["sha256"]: f"{split}/{shard['name']}" for split, one in manifests.items() for shard in one["shards"]}
    known |= {manifest["index"]["sha256"]: f"{split}/{INDEX}" for split, manifest in manifests.items()}
    jobs: list[tuple[str, Callable[[], list[Finding]]]] = []
    if info is not None:
        known[info["items_sha256"]] = form.ITEMS
        items = {"bytes": info["items_bytes"], "sha256": info["items_sha256"]}
        jobs.append((form.ITEMS, partial(check_file, shards, form.ITEMS, items, known)))
    for split, manifest in manifests.items():
        jobs.append((f"{split}/{INDEX}", partial(check_index, shards, split, manifest, known)))
        jobs += [
            (f"{split}/{shard['name']}", partial(check_shard, shards, split, manifest, number, known))
            for number, shard in enumerate(manifest["shards"])
        ]
    return [job for file, job in jobs if only is None or file in only]


def _run(jobs: list[Callable[[], list[Finding]]], threads: int | None) -> Iterator[list[Finding]]:
    """Run the jobs on threads (hashing releases the interpreter's lock); findings in the order of the jobs."""
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(lambda job: job(), jobs)
