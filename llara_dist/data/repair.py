"""`llara-dist shards repair`: rebuild what is damaged in a shards folder, byte for byte, and touch nothing else."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llara_dist import console
from llara_dist.data import shards as form
from llara_dist.data.rebuild import Rebuild, index_of_tar
from llara_dist.data.records import identity_of
from llara_dist.data.shard_index import INDEX, ShardIndex, read_batch, write_index
from llara_dist.data.verify import REPAIR_STAGING, Survey, check_shard_set, say_findings, survey
from llara_dist.errors import InputError
from llara_dist.integrity import fsync_folder, sha256_file, write_json


def repair(shards: Path, data: Path, tokenizer: str | None = None, processes: int | None = None) -> dict[str, Any]:
    """Rebuild the damaged files of a shards folder from its dataset folder; whole files are left alone.

    Killed in the middle, it can be run again.

    Example: llara-dist shards repair shards/out/movielens --data data/movielens

    Args:
        shards: shards folder, made by `llara-dist shards build`.
        data: the dataset folder that it was built from.
        tokenizer: folder or hub id, if it no longer lies where the build found it.
        processes: threads that read and worker processes that write, all cores by default.

    Raises:
        InputError: another data set, tokenizer or version than the build's, or nothing left that says how to build.
    """
    shards, data = Path(shards), Path(data)
    found = survey(shards, processes)
    say_findings(found)
    strange = sorted(
        finding.file for finding in found.findings if finding.kind == "unexpected" and finding.file != REPAIR_STAGING
    )
    done = {"shards": str(shards), "ok": True, "repaired": [], "unproven": [], "unexpected": strange}
    if all(finding.kind == "unexpected" for finding in found.findings):
        if (shards / REPAIR_STAGING).exists():
            with _staging(shards):
                pass  # leaves with what an interrupted repair left
        console.say(f"{shards}: nothing to repair{_besides(strange)}")
        return done
    identity, recorded = _surviving(found, tokenizer)
    rebuild = Rebuild.load(identity, data, recorded, tokenizer, processes or len(os.sched_getaffinity(0)))
    with _staging(shards) as staging:
        work = _Work(found, rebuild, staging, dict(found.manifests))
        for split in found.splits:
            work.repair_split(split)
        work.repair_items()
        work.repair_info(recorded)
    after = survey(shards, processes, only=work.repaired)
    left = [finding for finding in after.findings if finding.kind != "unexpected"]
    if left:
        raise InputError(f"{shards}: damaged again after the repair: {left[0].line(shards)}; check the disk")
    for file in work.unproven:
        console.say(f"{shards / file}: derived from what is left; nothing that survived names its hash")
    console.say(f"{shards}: {len(work.repaired)} files rebuilt, all as built{_besides(strange)}")
    return {**done, "repaired": work.repaired, "unproven": work.unproven}


def _besides(strange: list[str]) -> str:
    return f"; {len(strange)} files do not belong there and were left alone: {', '.join(strange)}" if strange else ""


def _surviving(found: Survey, tokenizer: str | None) -> tuple[dict[str, Any], str]:
    """The identity and the tokenizer that the surviving records name.

    Raises:
        InputError: no record survives, or none names the tokenizer.
    """
    if found.info is not None:
        return identity_of(found.info), found.info["tokenizer"]
    if not found.manifests:
        raise InputError(
            f"{found.shards}: neither {form.SHARDS} nor any manifest is whole, so nothing says how the shards were "
            "built; build them again with `llara-dist shards build --overwrite true`"
        )
    # A damaged shards.json may still hold the name; whether it is the right tokenizer is checked by its hash.
    recorded = _legible_tokenizer(found.shards) or tokenizer
    if recorded is None:
        raise InputError(f"{found.shards / form.SHARDS}: damaged, it named the tokenizer; give it by --tokenizer")
    return identity_of(next(iter(found.manifests.values()))), recorded


def _legible(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _legible_tokenizer(shards: Path) -> str | None:
    match = re.search(r'"tokenizer": ("(?:[^"\\\n]|\\.)*")', _legible(shards / form.SHARDS))
    with contextlib.suppress(ValueError):
        return json.loads(match.group(1)) if match else None
    return None


@contextlib.contextmanager
def _staging(shards: Path) -> Iterator[Path]:
    """An empty folder inside the shards folder, for one repair at a time; what a killed one left is removed.

    Raises:
        InputError: another repair works on these shards.
    """
    folder = shards / REPAIR_STAGING
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{shards}: another `shards repair` works on it; wait for its end") from None
        except OSError:
            pass  # a file system without locks: two repairs at once are then the user's to avoid
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


@dataclass
class _Work:
    """One repair under way."""

    found: Survey
    rebuild: Rebuild
    staging: Path
    manifests: dict[str, dict[str, Any]]
    """by split: those that were whole, then those derived again"""
    repaired: list[str] = field(default_factory=list)
    """files that were replaced, paths inside the shards folder"""
    unproven: list[str] = field(default_factory=list)
    """those of them whose hash nothing names"""

    def repair_split(self, split: str) -> None:
        """Make a split whole: its manifest, then the tars that it finds damaged, then the index."""
        findings = [finding for finding in self.found.findings if finding.split == split]
        damaged = {finding.file for finding in findings if finding.kind != "unexpected"}
        if not damaged:
            return
        folder = self.found.shards / split
        folder.mkdir(exist_ok=True)
        if f"{split}/{form.MANIFEST}" in damaged:
            if split not in self.manifests:
                self.manifests[split] = self._manifest(split)
                again = check_shard_set(self.found.shards, split, self.manifests[split], self.rebuild.processes)
                damaged = {finding.file for finding in again}
            self._write_record(f"{split}/{form.MANIFEST}", self.manifests[split])
        manifest = self.manifests[split]
        numbers = [n for n, shard in enumerate(manifest["shards"]) if f"{split}/{shard['name']}" in damaged]
        written: dict[int, ShardIndex] = {}
        results = self.rebuild.write_shards(self.staging, split, set(numbers)) if numbers else ()
        for number, (path, result) in zip(
            numbers, console.progress(results, f"shards of {split}", total=len(numbers)), strict=True
        ):
            self._place(path, f"{split}/{path.name}", manifest["shards"][number]["sha256"])
            written[number] = result.index
        if f"{split}/{INDEX}" in damaged:
            write_index(self.staging / INDEX, [self._index(split, n, written) for n in range(len(manifest["shards"]))])
            self._place(self.staging / INDEX, f"{split}/{INDEX}", manifest["index"]["sha256"])

    def _manifest(self, split: str) -> dict[str, Any]:
        """A split's manifest: from the tars where shards.json proves it, else by building the split once more."""
        info, file = self.found.info, f"{split}/{form.MANIFEST}"
        recorded = None if info is None else info["splits"][split]["hash"]
        if recorded is not None:
            manifest = self.rebuild.manifest_from(self.found.shards / split, split, self.staging)
            if manifest is not None and manifest["hash"] == recorded:
                return manifest
        console.say(f"{self.found.shards / file}: building {split} once more to know its hashes")
        manifest = self.rebuild.manifest(split, self.staging)
        if recorded is None:
            self.unproven.append(file)
        elif manifest["hash"] != recorded:
            raise self._differs(file)
        return manifest

    def _index(self, split: str, number: int, written: dict[int, ShardIndex]) -> ShardIndex:
        """A shard's rows: from the index where it is whole, else from the shard."""
        manifest, folder = self.manifests[split], self.found.shards / split
        if number in written:
            return written[number]
        try:
            return read_batch(folder / INDEX, manifest, number)
        except InputError:
            return index_of_tar(folder / manifest["shards"][number]["name"])

    def repair_items(self) -> None:
        """Make items.parquet whole; where shards.json is damaged, which names its hash, it is held to its source."""
        damaged = any(finding.file == form.ITEMS for finding in self.found.findings)
        if not damaged and self.found.info is not None:
            return
        path = self.staging / form.ITEMS
        self.rebuild.write_items(path)
        if self.found.info is not None:
            self._place(path, form.ITEMS, self.found.info["items_sha256"])
        elif damaged or sha256_file(path) != sha256_file(self.found.shards / form.ITEMS):
            self._place(path, form.ITEMS, sha256_file(path))
            self.unproven.append(form.ITEMS)

    def repair_info(self, recorded: str) -> None:
        """Make shards.json whole, last of all."""
        if not any(finding.file == form.SHARDS for finding in self.found.findings):
            return
        if self.found.info is not None:
            self._write_record(form.SHARDS, self.found.info)
            return
        shards, manifests = self.found.shards, {split: self.manifests[split] for split in self.found.splits}
        indexes = {
            split: [read_batch(shards / split / INDEX, manifest, n) for n in range(len(manifest["shards"]))]
            for split, manifest in manifests.items()
        }
        legible = _legible(shards / form.SHARDS)
        named = {self.rebuild.tokenizer: None, recorded: None}  # in this order, each once
        derived = [self.rebuild.info(manifests, indexes, shards / form.ITEMS, tokenizer) for tokenizer in named]
        proven = [info for info in derived if info["hash"] in legible]
        # The hash that the damaged file named proves all that was derived, the manifests' hashes among it.
        self.unproven = [] if proven else [*self.unproven, form.SHARDS]
        self._write_record(form.SHARDS, (proven or derived)[0])

    def _write_record(self, file: str, value: dict[str, Any]) -> None:
        self._can_stand(file)
        write_json(self.staging / Path(file).name, value)
        self._move(self.staging / Path(file).name, file)

    def _place(self, path: Path, file: str, sha256: str) -> None:
        """Move a rebuilt file to its place if it has the recorded hash; the damaged one stays otherwise."""
        if sha256_file(path) != sha256:
            raise self._differs(file)
        self._can_stand(file)
        self._move(path, file)

    def _can_stand(self, file: str) -> None:
        if (self.found.shards / file).is_dir():
            raise InputError(f"{self.found.shards / file}: a folder stands in the file's place; move it away")

    def _move(self, path: Path, file: str) -> None:
        place = self.found.shards / file
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(path, place)
        fsync_folder(place.parent)
        self.repaired.append(file)

    def _differs(self, file: str) -> InputError:
        return InputError(
            f"{self.found.shards / file}: what was rebuilt has another sha256 than the recorded one, so the damaged "
            "file was left; data set and tokenizer are the recorded ones, so the release of llara_dist or of a library "
            "differs from the build's: use that one, or build again with `llara-dist shards build --overwrite true`"
        )
