"""The folders that a run writes to: room, speed, what their file systems do and do not promise."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llara_dist.config import DataConfig
from llara_dist.console import GIB
from llara_dist.doctor.bounded import ProbeError, call
from llara_dist.doctor.verdicts import error, passed, warning
from llara_dist.errors import Finding
from llara_dist.stream.locations import cache_folder
from llara_dist.training.preflight.resources import nearest_existing

PREFIX = ".llara_dist-doctor-"
"""of what is written to try a folder, removed afterwards"""
WRITTEN = 64 << 20
"""bytes"""
SLOW = 20e6
"""bytes a second below which a checkpoint (about 0.6 GB for LoRA r 8 on a 7B model) takes longer than half a minute"""
ABANDONED_S = 3600.0
ANSWERS_S = 15.0
WRITING_S = 60.0
LOW = 2 * GIB
FEW_FILES = 1000
NETWORK = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "afs", "wekafs", "panfs", "pvfs2"}
OBJECT_STORES = ("s3fs", "gcsfuse", "goofys", "rclone", "mountpoint-s3", "blobfuse", "geesefs")
"""FUSE file systems over object stores: no atomic rename"""


@dataclass(frozen=True)
class FolderFacts:
    """What was found out about a folder, or the nearest that is there.

    Attributes:
        path: that folder.
        writable: whether this user may write there.
        free: bytes that are free to this user.
        inodes: files that can still be made, None where the file system does not count them.
        kind: of file system, as mounted: ext4, nfs4, tmpfs.
        source: what is mounted.
    """

    path: str
    writable: bool
    free: int
    inodes: int | None
    kind: str
    source: str


@dataclass(frozen=True)
class WriteFacts:
    """What writing there gave.

    Attributes:
        seconds: that 64 MiB took, durable.
        renamed: whether renaming over an existing file replaced it.
        locked: whether flock works.
    """

    seconds: float
    renamed: bool
    locked: bool


def look_at(path: str) -> dict[str, Any]:
    """`FolderFacts` of a folder; called in a process of its own."""
    folder = nearest_existing(Path(path).expanduser())
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    usage = os.statvfs(folder)
    kind, source = mounted(folder, Path("/proc/self/mountinfo").read_text())
    return {
        "path": str(folder),
        "writable": os.access(folder, os.W_OK | os.X_OK),
        "free": usage.f_bavail * usage.f_frsize,
        "inodes": usage.f_favail if usage.f_files else None,
        "kind": kind,
        "source": source,
    }


def mounted(folder: Path, mountinfo: str) -> tuple[str, str]:
    """Kind and source of the mount that a folder lies on.

    Args:
        folder: without symbolic links.
        mountinfo: as Linux gives it (man 5 proc); of mounts at one place the last holds.
    """
    best, found = -1, ("unknown", "")
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kinds) < 2:
            continue
        place = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        if folder.is_relative_to(place) and len(place.parts) >= best:
            best, found = len(place.parts), (kinds[0], kinds[1])
    return found


def try_writing(path: str, name: str) -> dict[str, Any]:
    """`WriteFacts` of a folder that is there; called in a process of its own, and `remove_tried` after it.

    Args:
        path: the folder.
        name: of what is written.
    """
    first, second = Path(path) / name, Path(path) / f"{name}.old"
    for left in Path(path).glob(f"{PREFIX}*"):  # by a doctor that was killed
        if time.time() - left.stat().st_mtime > ABANDONED_S:
            left.unlink(missing_ok=True)
    try:
        block = secrets.token_bytes(1 << 20)  # random, since some file systems compress
        start = time.perf_counter()
        with open(first, "wb") as file:
            for _ in range(WRITTEN >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        second.write_bytes(b"old")
        os.replace(first, second)
        renamed = not first.exists() and second.stat().st_size == WRITTEN
        with open(second, "rb") as file:
            locked = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                locked = False
    finally:
        remove_tried(path, name)
    return {"seconds": seconds, "renamed": renamed, "locked": locked}


def remove_tried(path: str, name: str) -> None:
    """Remove what `try_writing` wrote, if anything is left."""
    for left in (Path(path) / name, Path(path) / f"{name}.old"):
        with contextlib.suppress(OSError):
            left.unlink(missing_ok=True)


def check_room(check: str, given: str, facts: FolderFacts, needed: bool = True) -> list[Finding]:
    """Whether a folder can be written and has room.

    Args:
        check: what the folder is for.
        given: as the user named it.
        facts: of it.
        needed: whether no run works without it; some do without a cache or a home.
    """
    where = given if Path(given) == Path(facts.path) else f"{given} ({facts.path})"
    severity = error if needed else warning
    if not facts.writable:
        return [severity(check, f"{where}: not writable by this user", "choose another folder")]
    if facts.inodes is not None and facts.inodes < FEW_FILES:
        return [severity(check, f"{where}: only {facts.inodes} more files can be made (inodes)", "remove files there")]
    if facts.free < LOW:
        shown = f"{where}: {facts.free >> 20} MiB free on {facts.kind}"
        severity = severity if facts.free < 2 * WRITTEN else warning
        return [severity(check, shown, "free some: a full disk stops checkpoints, caches and downloads")]
    return [passed(check, f"{where}: {facts.free / GIB:.0f} GiB free on {facts.kind}")]


def check_kind(check: str, facts: FolderFacts) -> list[Finding]:
    """What the run's folder can rely on where it lies.

    Args:
        check: what the folder is for.
        facts: of it.
    """
    kind, where = facts.kind, f"{facts.path} lies on {facts.kind}"
    if kind.startswith("fuse") and any(name in f"{kind} {facts.source}" for name in OBJECT_STORES):
        remedy = "put runs on a file system, and copy finished ones to the object store"
        return [error(check, f"{where}, an object store: renaming is not atomic there", remedy)]
    if kind == "tmpfs":
        return [warning(check, f"{where}: memory, gone at a reboot", "choose a folder on a disk")]
    if kind == "overlay":
        return [warning(check, f"{where}: gone with the container", "mount a folder of the host and choose that")]
    if kind in NETWORK or kind.startswith("fuse"):
        if kind.startswith("nfs"):
            return [passed(check, f"{where}: shared by nodes; NFS may show a new file to others only after a minute")]
        return [passed(check, f"{where}: shared by nodes")]
    return [passed(check, f"{where}: a disk of this node")]


def check_writing(check: str, facts: FolderFacts, tried: WriteFacts) -> list[Finding]:
    """What writing there gave."""
    findings = []
    speed = WRITTEN / tried.seconds
    if not tried.renamed:
        remedy = "choose a folder on a local disk or a POSIX file system"
        findings.append(error(check, f"{facts.path}: renaming over a file does not replace it", remedy))
    if not tried.locked:
        remedy = "mount it with locks (Lustre: -o flock; NFS: a lock daemon); data.cache needs them"
        findings.append(warning(check, f"{facts.path}: flock does not work", remedy))
    shown = f"{speed / 1e6:.0f} MB/s, durable (64 MiB)"
    if speed < SLOW:
        findings.append(warning(check, f"{facts.path}: {shown}", "choose a faster disk, or save checkpoints seldom"))
    elif not findings:
        findings.append(passed(check, f"{shown}; renaming and locks work"))
    return findings


def examine(out: Path, quick: bool) -> list[Finding]:
    """The topic's findings.

    Args:
        out: the run's folder, which need not be there.
        quick: leave out writing.
    """
    findings: list[Finding] = []
    facts = _asked("run folder", str(out), findings)
    if facts is not None:
        room = check_room("run folder", str(out), facts)
        findings += [*room, *check_kind("file system", facts)]
        if not quick and all(finding.severity != "error" for finding in room):
            findings += _written(facts)
    others = {
        "shard cache": str(cache_folder(DataConfig())),
        "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
        "home": os.environ.get("HF_HOME", "~"),
    }
    for check, place in others.items():
        other = _asked(check, place, findings)
        if other is not None:
            findings += check_room(check, place, other, needed=False)
    return findings


def _asked(check: str, place: str, findings: list[Finding]) -> FolderFacts | None:
    try:
        return FolderFacts(**call(look_at, ANSWERS_S, path=place))
    except ProbeError as silent:
        found = f"{place}: {silent}"
        findings.append(error(check, found, "choose another folder; if its file server is gone, have it mended"))
        return None


def _written(facts: FolderFacts) -> list[Finding]:
    name = f"{PREFIX}{secrets.token_hex(8)}"
    remove: Callable[..., Any] = remove_tried
    try:
        return check_writing("writing", facts, WriteFacts(**call(try_writing, WRITING_S, path=facts.path, name=name)))
    except ProbeError as silent:
        with contextlib.suppress(ProbeError):
            call(remove, ANSWERS_S, path=facts.path, name=name)
        found = f"{facts.path}: 64 MiB cannot be written: {silent}"
        return [error("writing", found, "choose another folder, or have the disk or your quota looked at")]
