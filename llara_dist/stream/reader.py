"""Ranged, checked reads of shards: a sample is one pread at the index's offset, and its crc32 must be the index's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llara_dist.data import shards as form
from llara_dist.data.inspect import read_shown_titles
from llara_dist.data.samples import Sample, unpack
from llara_dist.data.shard_index import INDEX, REMEDY, IndexFile
from llara_dist.errors import InputError
from llara_dist.stream.folder import File, Folder, LocalFolder, OpenFiles
from llara_dist.stream.order import Source


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

    @classmethod
    def empty(cls, n: int) -> SampleInfo:
        """Room for n samples, to be filled in."""
        dtypes = (np.uint64, np.int16, np.int32, np.int32, np.int32)
        return cls(*(np.empty(n, dtype) for dtype in dtypes))


class Samples(Protocol):
    """One split of a shards folder or of a mixture, open for reading."""

    @property
    def info(self) -> dict[str, Any]:
        """dataset (name, hash), tokenizer_hash, num_items"""
        ...

    @property
    def hash(self) -> str:
        """Names the content."""
        ...

    @property
    def sources(self) -> tuple[Source, ...]:
        """What a plan is made of."""
        ...

    @property
    def longest(self) -> int:
        """Positions of the longest row, in the hybrid form."""
        ...

    @property
    def all(self) -> SampleInfo:
        """The whole split; for splits that are small enough to be looked at whole."""
        ...

    def __len__(self) -> int: ...

    def lookup(self, ids: np.ndarray) -> SampleInfo:
        """What the index says of samples, int64 [n] in any order."""
        ...

    def read(self, ids: Iterable[int]) -> list[Sample]:
        """Samples in the given order. Raises InputError where one is damaged."""
        ...

    def titles(self) -> list[str]:
        """By item id, the titles as the prompts show them."""
        ...


@dataclass(frozen=True)
class ShardSet:
    """One split of a shards folder, open for reading. Sample ids count through the shards in tar order.

    Safe to hand to worker processes: files are opened and mapped where they are used and stay there.
    """

    folder: Folder
    """the shards folder"""
    info: dict[str, Any]
    """shards.json: dataset, tokenizer_hash, domain, num_items, recipe, counts"""
    manifest: dict[str, Any]
    index: IndexFile
    _files: OpenFiles = field(default_factory=OpenFiles, repr=False, compare=False)

    @classmethod
    def open(cls, shards: Folder | Path | str, split: str = "train") -> ShardSet:
        """Open a split.

        shards.json and manifest are checked against their hashes, the index and the shards of a local folder against
        their sizes; the index's record batches and the samples when they are read.

        Raises:
            InputError: something is missing, truncated, altered or from another build (names the file).
        """
        folder = LocalFolder(Path(shards)) if isinstance(shards, str | Path) else shards
        info = form.parse_shards_info(folder.read(form.SHARDS), folder.shown(form.SHARDS))
        form.require_split(split, info, folder.shown(""))
        inside = folder.folder(split)
        manifest = form.parse_manifest(inside.read(form.MANIFEST), inside.shown(form.MANIFEST), split, info)
        if isinstance(inside, LocalFolder):
            for shard in manifest["shards"]:
                inside.local(_file(shard))
        index = inside.local(File(INDEX, manifest["index"]["bytes"], manifest["index"]["sha256"]))
        return cls(folder, info, manifest, IndexFile.open(index, manifest))

    def __len__(self) -> int:
        return self.manifest["samples"]

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

    @property
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
        found = SampleInfo.empty(len(ids))
        for shard, places, rows in self._by_shard(ids):
            index = self.index.shard(shard)
            found.passes[places] = self.manifest["shards"][shard]["pass"]
            found.keys[places] = index.keys[rows]
            found.tokens[places] = index.tokens[rows]
            found.slots[places] = index.slots[rows]
            found.answer_tokens[places] = index.answer_tokens[rows]
        return found

    @property
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
        self._files.tick()
        wanted = np.fromiter(ids, dtype=np.int64)
        samples: list[Any] = [None] * len(wanted)
        for shard, places, rows in self._by_shard(wanted):
            index, pass_index = self.index.shard(shard), self.manifest["shards"][shard]["pass"]
            descriptor = self._descriptor(shard)
            columns = (index.offsets[rows], index.sizes[rows], index.crc32[rows], index.keys[rows])
            for place, offset, size, crc32, key in zip(places.tolist(), *map(np.ndarray.tolist, columns), strict=True):
                payload = os.pread(descriptor, size, offset)
                sample = None
                if form.payload_problem(payload, size, crc32) is None:
                    sample = unpack(payload)
                if sample is None or sample.key != key or sample.pass_index != pass_index:
                    sample = self._read_again(shard, offset, size, crc32, key)
                    descriptor = self._descriptor(shard)
                samples[place] = sample
        return samples

    def _descriptor(self, shard: int) -> int:
        return self._files.get(shard, lambda: self.split_folder.open(self.file(shard)))

    def _read_again(self, shard: int, offset: int, size: int, crc32: int, key: int) -> Sample:
        """A sample whose bytes are not the index's: once more where the copy can be fetched anew, else say so."""
        pass_index, file, folder = self.manifest["shards"][shard]["pass"], self.file(shard), self.split_folder
        payload = os.pread(self._descriptor(shard), size, offset)
        self._files.close(shard)
        if folder.discard(file):
            payload = os.pread(self._descriptor(shard), size, offset)
        problem = form.payload_problem(payload, size, crc32)
        if problem is None:
            sample = unpack(payload)
            if sample.key == key and sample.pass_index == pass_index:
                return sample
            problem = f"holds key {sample.key} of pass {sample.pass_index}"
        raise InputError(
            f"{folder.shown(file.name)}: sample at offset {offset}, key {key}: {problem}; {REMEDY}", everywhere=False
        )

    @property
    def split_folder(self) -> Folder:
        """Where the tars lie."""
        return self.folder.folder(self.manifest["split"])

    def file(self, shard: int) -> File:
        """A shard's file."""
        return _file(self.manifest["shards"][shard])

    def titles(self) -> list[str]:
        """By item id, the titles as the prompts show them.

        Raises:
            InputError: items.parquet is missing or altered.
        """
        file = File(form.ITEMS, self.info["items_bytes"], self.info["items_sha256"])
        return read_shown_titles(self.folder.local(file), self.info)

    def close(self) -> None:
        """Close this process's file descriptors; reading opens them again."""
        self._files.close()


def _file(shard: dict[str, Any]) -> File:
    return File(shard["name"], shard["bytes"], shard["sha256"])
