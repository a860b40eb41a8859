"""The shard format: tar members and the manifest; how they are written, hashed and read back.

A *shard set* is one folder (`train/`, `val/` or `test/`): `000000.tar …`, `index.arrow`, `manifest.json` (last).
WebDataset alone cannot tell a damaged tar from a short one, so the truth is in the index: where each sample lies and
its crc32. The manifest holds the hashes of the shards and of the index. `shards/README.md` describes the format.
"""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path
from typing import Any

from llara_dist.data.shard_index import INDEX, REMEDY, IndexFile
from llara_dist.errors import InputError
from llara_dist.integrity import parse_json, sha256_file, sha256_json

FORMAT_VERSION = 2
SPLITS = ("train", "val", "test")
MANIFEST, SHARDS, ITEMS = "manifest.json", "shards.json", "items.parquet"


def shard_name(number: int) -> str:
    """A shard's file name, by its position in the manifest."""
    return f"{number:06d}.tar"


def member_name(pass_index: int, key: int) -> str:
    """A sample's name in the tar.

    No dot in the key, since WebDataset groups by what stands before the first one; "mp" is the ending that its own
    decoder knows as msgpack.
    """
    return f"{pass_index:02d}-{key:010d}.mp"


def tar_member(name: str, payload: bytes) -> bytes:
    """One tar member, header and padded payload (which begins after 512 bytes), independent of clock and user."""
    header = tarfile.TarInfo(name)
    header.size = len(payload)
    header.mode = 0o444
    padding = bytes(-len(payload) % tarfile.BLOCKSIZE)
    return header.tobuf(tarfile.USTAR_FORMAT) + payload + padding


def tar_end(size: int) -> bytes:
    """The end of a tar of `size` bytes so far: two zero blocks, filled up to a whole record."""
    end = size + 2 * tarfile.BLOCKSIZE
    return bytes(2 * tarfile.BLOCKSIZE + (-end % tarfile.RECORDSIZE))


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """The JSON object with its own hash as the last field, "hash"."""
    return {**value, "hash": sha256_json(value)}


def parse_sealed(data: bytes, shown: str, what: str) -> dict[str, Any]:
    """The content of a sealed JSON file; `shown` names it in errors, `what` says what was expected.

    Raises:
        InputError: not JSON, of another format version, or altered.
    """
    value = parse_json(data, shown, what)
    if value.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{shown}: format_version {value.get('format_version')!r}, this release reads {FORMAT_VERSION}; "
            "rebuild with `llara-dist shards build`"
        )
    if value.get("hash") != sha256_json({name: field for name, field in value.items() if name != "hash"}):
        raise InputError(f"{shown}: altered, its content does not have the hash it names; {REMEDY}")
    return value


def parse_shards_info(data: bytes, shown: str) -> dict[str, Any]:
    """The content of a `shards.json`, its own hash checked; `shown` names the file in errors.

    Raises:
        InputError: of another format version, or altered.
    """
    info = parse_sealed(data, shown, "a shards folder (made by `llara-dist shards build`)")
    if "splits" not in info:  # sealed, but as something else
        raise InputError(f"{shown}: holds a shard set's manifest; {REMEDY}")
    return info


def parse_manifest(data: bytes, shown: str, split: str, info: dict[str, Any]) -> dict[str, Any]:
    """The content of a split's `manifest.json`, checked against its own hash and against shards.json.

    Raises:
        InputError: altered, or from another build.
    """
    manifest = parse_sealed(data, shown, "a shard set's manifest")
    if manifest["hash"] != info["splits"][split]["hash"]:
        raise InputError(f"{shown}: belongs to another build than the folder's {SHARDS}; {REMEDY}")
    return manifest


def require_split(split: str, info: dict[str, Any], shown: str) -> None:
    """Raises InputError where a shards folder has no such split."""
    if split not in info["splits"]:
        raise InputError(f"{shown}: no split {split!r}; there are {', '.join(info['splits'])}")


def read_shards_info(shards: Path) -> dict[str, Any]:
    """`shards.json` of a shards folder, its own hash checked.

    Raises:
        InputError: missing, of another format version, or altered.
    """
    path = Path(shards) / SHARDS
    return parse_shards_info(_bytes(path, "a shards folder (made by `llara-dist shards build`)"), str(path))


def read_manifest(shards: Path, split: str, info: dict[str, Any]) -> dict[str, Any]:
    """A split's `manifest.json`, checked against its own hash and against shards.json.

    Raises:
        InputError: missing, altered, from another build, or no such split.
    """
    require_split(split, info, str(shards))
    path = Path(shards) / split / MANIFEST
    return parse_manifest(_bytes(path, "a shard set's manifest"), str(path), split, info)


def _bytes(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: not found; expected {what}") from None


def read_index(folder: Path, manifest: dict[str, Any]) -> IndexFile:
    """A shard set's index; its size is checked now, each shard's record batch when it is first looked at.

    Raises:
        InputError: missing or truncated.
    """
    return IndexFile.open(Path(folder) / INDEX, manifest)


def file_problem(path: Path, size: int, sha256: str) -> str | None:
    """What is wrong with a file: "missing", "truncated …", "longer …", "altered …", or None."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return "missing"
    if found < size:
        return f"truncated, {found} of {size} bytes"
    if found > size:
        return f"altered, {found} bytes instead of {size}"
    if sha256_file(path) != sha256:
        return "altered, its sha256 is not the manifest's"
    return None


def payload_problem(payload: bytes, size: int, crc32: int) -> str | None:
    """What is wrong with a sample's bytes: "truncated …", "altered …", or None."""
    if len(payload) < size:
        return f"truncated, {len(payload)} of {size} bytes"
    if zlib.crc32(payload) != crc32:
        return "altered, its crc32 is not the index's"
    return None
