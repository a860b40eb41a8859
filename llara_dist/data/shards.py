"""The shard format: tar members, the index, the manifest; how they are written, hashed and read back.

A *shard set* is one folder (`train/`, `val/` or `test/`): `000000.tar …`, `index.parquet`, `manifest.json` (last).
WebDataset alone cannot tell a damaged tar from a short one, so the truth is in the index: where each sample lies and
its crc32. The manifest holds the hashes of the shards and of the index. `shards/README.md` describes the format.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist.errors import InputError
from llara_dist.integrity import read_json, sha256_bytes, sha256_file, sha256_json

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")
INDEX, MANIFEST, SHARDS, ITEMS = "index.parquet", "manifest.json", "shards.json", "items.parquet"
_REBUILD = "rebuild with `llara-dist shards build`"

_DTYPES = {
    "key": np.dtype(np.uint64),
    "pass": np.dtype(np.int16),
    "shard": np.dtype(np.int32),
    "offset": np.dtype(np.int64),
    "bytes": np.dtype(np.int32),
    "tokens": np.dtype(np.int32),
    "slots": np.dtype(np.int32),
    "answer_tokens": np.dtype(np.int32),
    "crc32": np.dtype(np.uint32),
}


@dataclass(frozen=True)
class Index:
    """Where each sample of a shard set lies and how long it is; every array [n], in shard order, then tar order."""

    keys: np.ndarray
    """uint64"""
    passes: np.ndarray
    """int16"""
    shards: np.ndarray
    """int32: position in the manifest's list of shards"""
    offsets: np.ndarray
    """int64: where the member's payload begins in the tar, bytes"""
    sizes: np.ndarray
    """int32: payload bytes"""
    tokens: np.ndarray
    """int32: positions of the hybrid form; the text-only form has `slots` fewer"""
    slots: np.ndarray
    """int32"""
    answer_tokens: np.ndarray
    """int32, EOS included"""
    crc32: np.ndarray
    """uint32 of the payload"""

    def __len__(self) -> int:
        return len(self.keys)


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


def write_index(path: Path, shard_indexes: Sequence[Index], dataset: str) -> dict[str, Any]:
    """Write `index.parquet`, one row group a shard; returns the manifest's entry with the hashes of its parts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.from_numpy_dtype(dtype)) for name, dtype in _DTYPES.items()])
    schema = schema.insert(2, pa.field("dataset", pa.string()))
    with pq.ParquetWriter(path, schema, compression="zstd", store_schema=False) as writer:
        for index in shard_indexes:
            arrays = [pa.array(getattr(index, f.name)) for f in fields(index)]
            arrays.insert(2, pa.array([dataset] * len(index), pa.string()))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=max(1, len(index)))
    data = path.read_bytes()
    metadata = pq.read_metadata(path)
    groups = []
    for number in range(metadata.num_row_groups):
        start, end = _row_group_range(metadata.row_group(number))
        groups.append({"offset": start, "bytes": end - start, "sha256": sha256_bytes(data[start:end])})
    return {"bytes": len(data), "sha256": sha256_bytes(data), "row_groups": groups}


def _row_group_range(group: Any) -> tuple[int, int]:
    """The byte range of a Parquet row group: its column chunks lie one after the other."""
    starts, ends = [], []
    for number in range(group.num_columns):
        column = group.column(number)
        start = column.data_page_offset
        if column.has_dictionary_page and column.dictionary_page_offset is not None:
            start = min(start, column.dictionary_page_offset)
        starts.append(start)
        ends.append(start + column.total_compressed_size)
    return min(starts), max(ends)


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """The JSON object with its own hash as the last field, "hash"."""
    return {**value, "hash": sha256_json(value)}


def _read_sealed(path: Path, what: str) -> dict[str, Any]:
    value = read_json(path, what)
    if value.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version {value.get('format_version')!r}, this release reads {FORMAT_VERSION}; {_REBUILD}"
        )
    if value.get("hash") != sha256_json({name: field for name, field in value.items() if name != "hash"}):
        raise InputError(f"{path}: altered, its content does not have the hash it names; {_REBUILD}")
    return value


def read_shards_info(shards: Path) -> dict[str, Any]:
    """`shards.json` of a shards folder, its own hash checked.

    Raises:
        InputError: missing, of another format version, or altered.
    """
    return _read_sealed(Path(shards) / SHARDS, "a shards folder (made by `llara-dist shards build`)")


def read_manifest(shards: Path, split: str, info: dict[str, Any]) -> dict[str, Any]:
    """A split's `manifest.json`, checked against its own hash and against shards.json.

    Raises:
        InputError: missing, altered, from another build, or no such split.
    """
    if split not in info["splits"]:
        raise InputError(f"{shards}: no split {split!r}; there are {', '.join(info['splits'])}")
    path = Path(shards) / split / MANIFEST
    manifest = _read_sealed(path, "a shard set's manifest")
    if manifest["hash"] != info["splits"][split]["hash"]:
        raise InputError(f"{path}: belongs to another build than {Path(shards) / SHARDS}; {_REBUILD}")
    return manifest


def read_index(folder: Path, manifest: dict[str, Any]) -> Index:
    """A shard set's index, its bytes checked against the manifest.

    Raises:
        InputError: missing, truncated or altered.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(folder) / INDEX
    expected = manifest["index"]
    problem = file_problem(path, expected["bytes"], expected["sha256"])
    if problem:
        raise InputError(f"{path}: {problem}; {_REBUILD}")
    try:
        table = pq.read_table(path, columns=list(_DTYPES))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); {_REBUILD}") from None
    columns = [table[name].to_numpy().astype(dtype) for name, dtype in _DTYPES.items()]
    if len(table) != manifest["samples"]:
        raise InputError(f"{path}: {len(table)} samples, the manifest names {manifest['samples']}; {_REBUILD}")
    return Index(*columns)


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
