"""What can be wrong with a file of a shards folder, and where; each file is read once, in pieces, whatever its size."""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llara_dist.data.shard_index import INDEX, ShardIndex, read_batch
from llara_dist.errors import InputError

_PIECE = 1 << 20
"""bytes read at once by a thread"""
_LISTED_SAMPLES = 1000
"""damaged samples named of one shard; the rest are counted, so that a folder of zeros can be told about in memory"""

Kind = Literal["missing", "truncated", "altered", "unexpected", "foreign"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, with one file or with one sample of a shard."""

    file: str
    """path inside the shards folder, e.g. "train/000002.tar" """
    kind: Kind
    """foreign: whole, but of another build or another file's content; altered: other bytes, or more of them"""
    detail: str
    """for a person, in one line; begins with the kind"""
    split: str | None = None
    shard: str | None = None
    """the tar that is damaged, or whose record batch is"""
    offset: int | None = None
    """bytes into the file: of the sample's payload or of the record batch; None where the whole file is meant"""
    key: int | None = None
    """of the damaged sample"""

    def line(self, shards: Path) -> str:
        """The finding in one line, with the file's whole path."""
        sample = "" if self.key is None else f"sample at offset {self.offset}, key {self.key}: "
        return f"{shards / self.file}: {sample}{self.detail}"


@dataclass
class _Scan:
    """One reading of a file from begin to end."""

    bytes: int = 0
    sha256: str = ""
    as_built_so_far: bool = False
    """whether the bytes up to the expected size have the expected hash; more may follow"""
    num_damaged: int = 0
    """samples"""
    samples: list[tuple[int, int, Kind, str]] = field(default_factory=list)
    """the first of them: offset, key, kind, detail"""

    def add(self, offset: int, key: int, kind: Kind, detail: str) -> None:
        """Note a damaged sample."""
        self.num_damaged += 1
        if len(self.samples) < _LISTED_SAMPLES:
            self.samples.append((offset, key, kind, f"{kind}, {detail}"))


def _scan(path: Path, size: int, sha256: str, rows: ShardIndex | None) -> _Scan:
    """Hash a file and check the samples that the index names, in one pass."""
    scan, digest, buffer = _Scan(), hashlib.sha256(), bytearray(_PIECE)
    columns = [] if rows is None else [rows.keys, rows.offsets, rows.sizes, rows.crc32]
    row = crc32 = 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            piece, begin, end = memoryview(buffer)[:count], scan.bytes, scan.bytes + count
            if begin < size <= end:
                head = digest.copy()
                head.update(piece[: size - begin])
                scan.as_built_so_far = head.hexdigest() == sha256
            digest.update(piece)
            begun = 0 if rows is None else int(np.searchsorted(rows.offsets, end))
            for key, offset, length, expected in zip(*(column[row:begun].tolist() for column in columns), strict=True):
                crc32 = zlib.crc32(piece[max(offset - begin, 0) : offset + length - begin], crc32)
                if offset + length > end:
                    break  # goes on in the next piece
                if crc32 != expected:
                    scan.add(offset, key, "altered", "its crc32 is not the index's")
                row, crc32 = row + 1, 0
            scan.bytes = end
    for key, offset, length, _ in zip(*(column[row:].tolist() for column in columns), strict=True):
        scan.add(offset, key, "truncated", f"{max(0, scan.bytes - offset)} of {length} bytes")
    scan.sha256 = digest.hexdigest()
    return scan


def check_file(
    shards: Path,
    file: str,
    entry: Mapping[str, Any],
    known: Mapping[str, str],
    rows: ShardIndex | None = None,
) -> list[Finding]:
    """Findings in one file: the file's first, then its damaged samples'.

    Args:
        shards: shards folder.
        file: path inside it.
        entry: what it must be: "bytes" and "sha256".
        known: sha256 → file of the folder that has it, to name a file that stands in another's place.
        rows: the index of a shard's samples, None for other files or where the index is damaged.
    """
    split = Path(file).parent.name or None
    shard = Path(file).name if file.endswith(".tar") else None

    def finding(kind: Kind, detail: str) -> Finding:
        return Finding(file, kind, f"{kind}{detail}", split, shard)

    try:
        status = os.stat(shards / file)
        if not stat.S_ISREG(status.st_mode):
            return [finding("altered", ", it is no regular file")]
        scan = _scan(shards / file, entry["bytes"], entry["sha256"], rows)
    except FileNotFoundError:
        return [finding("missing", "")]
    except OSError as error:
        return [finding("altered", f", it cannot be read ({error.strerror})")]
    samples = [Finding(file, kind, detail, split, shard, offset, key) for offset, key, kind, detail in scan.samples]
    if scan.sha256 == entry["sha256"]:
        return samples  # none, unless the index describes other samples than those of the recorded shard
    if scan.sha256 in known:
        return [finding("foreign", f", it holds the bytes of {known[scan.sha256]}")]
    if scan.as_built_so_far:
        note = "; up to there it is as built"
    elif rows is None:
        note = ""
    elif scan.num_damaged:
        note = f"; {scan.num_damaged} of its {len(rows)} samples are damaged"
    else:
        note = "; no sample is affected: the damage is in a tar header or in padding"
    if scan.bytes < entry["bytes"]:
        whole = finding("truncated", f", {scan.bytes} of {entry['bytes']} bytes{note}")
    elif scan.bytes > entry["bytes"]:
        whole = finding("altered", f", {scan.bytes} bytes instead of {entry['bytes']}{note}")
    else:
        whole = finding("altered", f", its sha256 is not the recorded one{note}")
    return [whole, *samples]


def check_shard(
    shards: Path, split: str, manifest: Mapping[str, Any], number: int, known: Mapping[str, str]
) -> list[Finding]:
    """Findings in one tar: the file's, and the damaged samples' with offset and key where the index is whole there."""
    entry = manifest["shards"][number]
    try:
        rows = read_batch(shards / split / INDEX, manifest, number)
    except InputError:
        rows = None  # a finding of the index; the tar is still held against its own sha256
    return check_file(shards, f"{split}/{entry['name']}", entry, known, rows)


def check_index(shards: Path, split: str, manifest: Mapping[str, Any], known: Mapping[str, str]) -> list[Finding]:
    """Findings in an index: the file's, and which shards' record batches are damaged."""
    file, entry = f"{split}/{INDEX}", manifest["index"]
    found = check_file(shards, file, entry, known)
    if not found or found[0].kind in ("missing", "foreign"):
        return found
    for number, batch in enumerate(entry["record_batches"]):
        try:
            read_batch(shards / file, manifest, number)
        except InputError:
            name = manifest["shards"][number]["name"]
            detail = f"altered in the record batch of shard {name} at offset {batch['offset']}"
            found.append(Finding(file, "altered", detail, split, name, batch["offset"]))
    if len(found) == 1:
        found = [Finding(file, found[0].kind, found[0].detail + " (no shard's record batch is affected)", split)]
    return found
