"""Ranged, checked reads of shards: a sample is one pread at the index's offset, and its crc32 must be the index's."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist.data import shards as form
from llara_dist.data.samples import Sample, unpack
from llara_dist.errors import InputError

_OPEN_FILES = 256
"""shards kept open in a process, the oldest closed first; the usual limit of a process is 1,024 files"""


@dataclass(frozen=True)
class ShardSet:
    """One split of a shards folder, open for reading. Sample ids are positions in its index.

    Safe to hand to worker processes: file handles are opened where they are used and stay there.
    """

    folder: Path
    """the split's folder"""
    info: dict[str, Any]
    """shards.json: dataset, tokenizer_hash, domain, num_items, recipe, counts"""
    manifest: dict[str, Any]
    index: form.Index
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
        return len(self.index)

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
    def keys(self) -> np.ndarray:
        """uint64 [n]"""
        return self.index.keys

    @property
    def passes(self) -> np.ndarray:
        """int16 [n]"""
        return self.index.passes

    @property
    def tokens(self) -> np.ndarray:
        """int32 [n]: positions of the hybrid form; the text-only form has `slots` fewer."""
        return self.index.tokens

    @property
    def slots(self) -> np.ndarray:
        """int32 [n]"""
        return self.index.slots

    @property
    def answer_tokens(self) -> np.ndarray:
        """int32 [n], EOS included"""
        return self.index.answer_tokens

    def read(self, ids: Iterable[int]) -> list[Sample]:
        """Read samples in the given order.

        Raises:
            InputError: a sample's bytes are short or have another crc32 (names shard, offset, key).
        """
        return [self._read(int(number)) for number in ids]

    def _read(self, number: int) -> Sample:
        index = self.index
        shard, offset = int(index.shards[number]), int(index.offsets[number])
        size, key = int(index.sizes[number]), int(index.keys[number])
        payload = os.pread(self._descriptor(shard), size, offset)
        problem = form.payload_problem(payload, size, int(index.crc32[number]))
        if problem is None:
            sample = unpack(payload)
            if sample.key == key and sample.pass_index == int(index.passes[number]):
                return sample
            problem = f"holds key {sample.key} of pass {sample.pass_index}"
        raise InputError(
            f"{self._path(shard)}: sample at offset {offset}, key {key}: {problem}; "
            f"run `llara-dist shards verify {self.folder.parent}` and restore the shard or rebuild",
            everywhere=False,
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
