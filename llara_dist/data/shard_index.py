"""The index of a shard set: where each sample lies, how long it is, and its crc32; one record batch a shard.

An Arrow IPC file without compression: a process maps it into memory and looks at the shards that it needs, the pages
are shared by all processes of a node, and no one ever reads it whole. Every record batch has its own sha256 in the
manifest, checked when the batch is first looked at; the file's own footer is not needed and not trusted.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist.errors import InputError
from llara_dist.integrity import sha256_bytes, sha256_file

INDEX = "index.arrow"
COLUMNS = {
    "key": np.dtype(np.uint64),
    "offset": np.dtype(np.int64),
    "bytes": np.dtype(np.int32),
    "tokens": np.dtype(np.int32),
    "slots": np.dtype(np.uint16),
    "answer_tokens": np.dtype(np.uint16),
    "crc32": np.dtype(np.uint32),
}
"""32 bytes a sample: 3.2 GB for 10^8 samples, which fill some 220 GB of shards."""


@dataclass(frozen=True)
class ShardIndex:
    """One shard's samples in tar order; every array [n]."""

    keys: np.ndarray
    """uint64"""
    offsets: np.ndarray
    """int64: where the member's payload begins in the tar, bytes"""
    sizes: np.ndarray
    """int32: payload bytes"""
    tokens: np.ndarray
    """int32: positions of the hybrid form; the text-only form has `slots` fewer"""
    slots: np.ndarray
    """uint16"""
    answer_tokens: np.ndarray
    """uint16, EOS included"""
    crc32: np.ndarray
    """uint32 of the payload"""

    def __len__(self) -> int:
        return len(self.keys)


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema([(name, pa.from_numpy_dtype(dtype)) for name, dtype in COLUMNS.items()])


class IndexWriter:
    """Writes the index shard by shard; nothing but the shard at hand is held in memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path = Path(path)
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, _schema())
        self._batches: list[tuple[int, int]] = []

    def write(self, index: ShardIndex) -> None:
        """Append the next shard's samples."""
        import pyarrow as pa

        arrays = [
            pa.array(getattr(index, item.name)).cast(pa.from_numpy_dtype(dtype))  # raises where a value does not fit
            for item, dtype in zip(fields(index), COLUMNS.values(), strict=True)
        ]
        batch = pa.record_batch(arrays, schema=_schema())
        self._writer.write_batch(batch)
        # Counted from the end: the first write puts the file's header before the batch.
        size = pa.ipc.get_record_batch_size(batch)
        self._batches.append((self._sink.tell() - size, size))

    def close(self) -> dict[str, Any]:
        """Finish the file; returns the manifest's entry: bytes, sha256, and offset, bytes, sha256 of each batch."""
        self._writer.close()
        self._sink.close()
        batches = []
        with open(self.path, "rb") as file:
            for offset, size in self._batches:
                file.seek(offset)
                batches.append({"offset": offset, "bytes": size, "sha256": sha256_bytes(file.read(size))})
        return {"bytes": self.path.stat().st_size, "sha256": sha256_file(self.path), "record_batches": batches}


def write_index(path: Path, indexes: Sequence[ShardIndex]) -> dict[str, Any]:
    """Write a whole index; returns the manifest's entry."""
    writer = IndexWriter(path)
    for index in indexes:
        writer.write(index)
    return writer.close()


def read_batch(path: Path, manifest: Mapping[str, Any], number: int) -> ShardIndex:
    """One shard's samples from an index that may be damaged elsewhere, missing or of another length.

    Raises:
        InputError: the file or the shard's record batch is damaged (names file, shard and offset).
    """
    entry = manifest["index"]["record_batches"][number]
    try:
        with open(path, "rb") as file:
            file.seek(entry["offset"])
            data = file.read(entry["bytes"])
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from None
    return _decode(data, Path(path), manifest, number)


def _decode(data: bytes | memoryview, path: Path, manifest: Mapping[str, Any], number: int) -> ShardIndex:
    """A record batch, its hash checked before Arrow sees it."""
    import pyarrow as pa

    entry, shard = manifest["index"]["record_batches"][number], manifest["shards"][number]
    where = f"{path}: record batch of shard {shard['name']} at offset {entry['offset']}"
    if len(data) < entry["bytes"]:
        raise InputError(f"{where}: truncated, {len(data)} of {entry['bytes']} bytes; {REMEDY}")
    if sha256_bytes(data) != entry["sha256"]:
        raise InputError(f"{where}: altered, its sha256 is not the manifest's; {REMEDY}")
    batch = pa.ipc.read_record_batch(pa.py_buffer(data), _schema())
    if len(batch) != shard["samples"]:
        raise InputError(f"{where}: {len(batch)} samples, the manifest names {shard['samples']}; {REMEDY}")
    return ShardIndex(*(column.to_numpy() for column in batch.columns))


@dataclass(frozen=True)
class IndexFile:
    """An index open for reading; pickles as its path, the memory map is made where it is used."""

    path: Path
    manifest: dict[str, Any]
    """of the shard set"""
    _map: list[mmap.mmap] = field(default_factory=list, repr=False, compare=False)
    _shards: dict[int, ShardIndex] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path, manifest: dict[str, Any]) -> IndexFile:
        """Open an index; its size is compared with the manifest.

        Raises:
            InputError: missing, truncated or longer.
        """
        index = cls(Path(path), manifest)
        index._check_size()
        return index

    def _check_size(self) -> None:
        expected = self.manifest["index"]["bytes"]
        found = self.path.stat().st_size if self.path.is_file() else None
        if found != expected:
            problem = (
                "missing"
                if found is None
                else f"{'truncated' if found < expected else 'altered'}, {found} of {expected} bytes"
            )
            raise InputError(f"{self.path}: {problem}; {REMEDY}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": [], "_shards": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def shard(self, number: int) -> ShardIndex:
        """The samples of a shard; views of the mapped file.

        Raises:
            InputError: its record batch is damaged (names file, shard and offset).
        """
        if number not in self._shards:
            self._shards[number] = self._read(number)
        return self._shards[number]

    def _read(self, number: int) -> ShardIndex:
        entry = self.manifest["index"]["record_batches"][number]
        if not self._map:
            self._check_size()  # a shorter file under a map would end the process
            with open(self.path, "rb") as file:
                self._map.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        found, expected = self._map[0].size(), self.manifest["index"]["bytes"]
        if found < expected:  # cut since it was mapped: to touch what is gone would end the process as well
            raise InputError(f"{self.path}: truncated while it was in use, {found} of {expected} bytes; {REMEDY}")
        data = memoryview(self._map[0])[entry["offset"] : entry["offset"] + entry["bytes"]]
        return _decode(data, self.path, self.manifest, number)


REMEDY = "run `llara-dist shards verify`, then `llara-dist shards repair`"
