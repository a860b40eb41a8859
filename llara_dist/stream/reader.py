"""Ranged, checked reads of shards: a sample is one pread at the index's offset, and its crc32 must be the index's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist.data import shards as form
from llara_dist.data.samples import Sample, unpack
from llara_dist.data.shard_index import REMEDY, IndexFile
from llara_dist.errors import InputError
from llara_dist.stream.order import Source

_OPEN_FILES = 256
"""shards kept open in a process, the oldest closed first; the usual limit of a process is 1,024 files"""


@dataclass(frozen=True)
class SampleInfo:
    """What the index says of some samples: enough to plan with, nothing is read from a shard. Arrays [n]."""

    keys: np.ndarray
    """uint64"""
    passes: np.ndarray
    """int16"""
    tokens: np.ndarray
    """int32: positions of the hybrid form; the text-only form has `slots` fewer"""
    slots: np.ndarray
    """int32"""
    answer_tokens: np.ndarray
    """int32, EOS included"""


@dataclass(frozen=True)
class ShardSet:
    """One split of a shards folder, open for reading. Sample ids count through the shards in tar order.

    Safe to hand to worker processes: files are opened and mapped where they are used and stay there.
    """

    folder: Path
    """the split's folder"""
    info: dict[str, Any]
    """shards.json: dataset, tokenizer_hash, domain, num_items, recipe, counts"""
    manifest: dict[str, Any]
    index: IndexFile
    _files: dict[int, int] = field(default_factory=dict, repr=False, compare=False)
    """shard → file descriptor, in this process"""

    @classmethod
    def open(cls, shards: Path | str, split: str = "train") -> ShardSet:
        """Open a split; shards.json, manifest and index are checked against their hashes, shards against their sizes.

        Raises:
            InputError: something is missing, truncated, altered or from another build (names the file).
        """
        shards = Path(shards)
        info = form.read_shards_info(shards)
        manifest = form.read_manifest(shards, split, info)
        folder = shards / split
        for shard in manifest["shards"]:
            path = folder / shard["name"]
            found = path.stat().st_size if path.is_file() else None
            if found != shard["bytes"]:
                problem = "missing" if found is None else f"{found} bytes, the manifest names {shard['bytes']}"
                raise InputError(f"{path}: {problem}; run `llara-dist shards verify {shards}`")
        return cls(folder, info, manifest, form.read_index(folder, manifest))

    def __len__(self) -> int:
        return self.manifest["samples"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def hash(self) -> str:
        """Hex sha256 of the manifest: names the content of the whole shard set."""
        return self.manifest["hash"]

    @property
    def num_passes(self) -> int:
        """How many draws of templates and candidates the set holds."""
        return self.manifest["passes"]

    @property
    def longest(self) -> int:
        """Positions of the longest row, in the hybrid form."""
        return self.info["splits"][self.manifest["split"]]["longest_row_tokens"]

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """What a plan is made of."""
        columns = {
            name: np.array([shard[name] for shard in self.manifest["shards"]], dtype=np.int64)
            for name in ("samples", "bytes", "pass")
        }
        return (Source(self.hash, self.first_ids[:-1], columns["samples"], columns["bytes"], columns["pass"]),)

    @cached_property
    def first_ids(self) -> np.ndarray:
        """int64 [shards+1]: the first sample of each shard, then the number of samples."""
        counts = [shard["samples"] for shard in self.manifest["shards"]]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def lookup(self, ids: np.ndarray) -> SampleInfo:
        """What the index says of samples, int64 [n] in any order.

        Raises:
            InputError: the index is damaged there.
        """
        ids = np.asarray(ids, dtype=np.int64)
        n = len(ids)
        found = SampleInfo(
            np.empty(n, np.uint64),
            np.empty(n, np.int16),
            np.empty(n, np.int32),
            np.empty(n, np.int32),
            np.empty(n, np.int32),
        )
        for shard, places, rows in self._by_shard(ids):
            index = self.index.shard(shard)
            found.passes[places] = self.manifest["shards"][shard]["pass"]
            found.keys[places] = index.keys[rows]
            found.tokens[places] = index.tokens[rows]
            found.slots[places] = index.slots[rows]
            found.answer_tokens[places] = index.answer_tokens[rows]
        return found

    @cached_property
    def all(self) -> SampleInfo:
        """The whole split; for splits that are small enough to be looked at whole."""
        return self.lookup(np.arange(len(self)))

    def _by_shard(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Groups of ids that lie in one shard: its number, places in `ids`, rows in the shard."""
        shards = np.searchsorted(self.first_ids, ids, side="right") - 1
        order = np.argsort(shards, kind="stable")
        cuts = np.flatnonzero(np.diff(shards[order])) + 1
        for places in np.split(order, cuts) if len(order) else []:
            shard = int(shards[places[0]])
            yield shard, places, ids[places] - self.first_ids[shard]

    def read(self, ids: Iterable[int]) -> list[Sample]:
        """Read samples in the given order.

        Raises:
            InputError: a sample's bytes are short or have another crc32 (names shard, offset, key).
        """
        return [self._read(int(number)) for number in ids]

    def _read(self, number: int) -> Sample:
        shard = int(np.searchsorted(self.first_ids, number, side="right")) - 1
        index, row = self.index.shard(shard), number - int(self.first_ids[shard])
        offset, size, key = int(index.offsets[row]), int(index.sizes[row]), int(index.keys[row])
        payload = os.pread(self._descriptor(shard), size, offset)
        problem = form.payload_problem(payload, size, int(index.crc32[row]))
        if problem is None:
            sample = unpack(payload)
            if sample.key == key and sample.pass_index == self.manifest["shards"][shard]["pass"]:
                return sample
            problem = f"holds key {sample.key} of pass {sample.pass_index}"
        raise InputError(
            f"{self._path(shard)}: sample at offset {offset}, key {key}: {problem}; {REMEDY}", everywhere=False
        )

    def _path(self, shard: int) -> Path:
        return self.folder / self.manifest["shards"][shard]["name"]

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            try:
                self._files[shard] = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise InputError(f"{self._path(shard)}: cannot be read ({error.strerror})", everywhere=False) from None
        return self._files[shard]

    def close(self) -> None:
        """Close this process's file handles; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])
