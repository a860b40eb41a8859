"""Parts of a build made again: from the dataset folder and the tokenizer by the recorded recipe, or from what is whole.

Every part is a pure function of (data set, tokenizer, recipe), so that one shard alone comes out as in a whole build.
"""

from __future__ import annotations

import tarfile
import tempfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist.data import shards as form
from llara_dist.data.build import splits_of
from llara_dist.data.dataset import Dataset, load_dataset
from llara_dist.data.drawing import Drawing
from llara_dist.data.inspect import matching_tokenizer
from llara_dist.data.placement import place_shards
from llara_dist.data.prompts import PromptEncoder
from llara_dist.data.records import shard_set_manifest, shards_info, split_entry, title_counts, write_items
from llara_dist.data.samples import unpack
from llara_dist.data.shard_index import INDEX, ShardIndex, write_index
from llara_dist.data.shard_writing import ShardResult, shard_tasks, write_shards
from llara_dist.data.wording import Template
from llara_dist.errors import InputError
from llara_dist.integrity import sha256_file


@dataclass(frozen=True)
class Rebuild:
    """A recorded build and what it was made from, checked to be the same."""

    identity: dict[str, Any]
    """data set, tokenizer and recipe, as the surviving records name them"""
    dataset: Dataset
    tokenizer: str
    """folder or hub id"""
    encoder: PromptEncoder
    drawing: Drawing
    processes: int

    @classmethod
    def load(cls, identity: dict[str, Any], data: Path, recorded: str, given: str | None, processes: int) -> Rebuild:
        """Load data set and tokenizer for a recorded build.

        Args:
            identity: of the build.
            data: dataset folder.
            recorded: the tokenizer that the build was given.
            given: the tokenizer to use instead, where that one has moved.
            processes: worker processes that write shards.

        Raises:
            InputError: another data set or another tokenizer than the recorded one, or one that cannot be read.
        """
        dataset = load_dataset(data)
        if dataset.hash != identity["dataset"]["hash"]:
            raise InputError(
                f"{data}: data set {dataset.hash[:12]}, the shards were built from {identity['dataset']['hash'][:12]} "
                f"({identity['dataset']['name']}); give that one by --data"
            )
        tokenizer = matching_tokenizer({**identity, "tokenizer": recorded}, given)
        recipe = identity["recipe"]
        templates = [Template(text) for text in recipe["templates"]]
        encoder = PromptEncoder(tokenizer, dataset.titles, templates, recipe["max_title_tokens"])
        table = encoder.table(recipe["num_candidates"])
        drawing = Drawing(table, recipe["seed"], recipe["max_tokens"], *dataset.touched)
        return cls(identity, dataset, given or recorded, encoder, drawing, processes)

    def passes(self, split: str) -> int:
        """How many passes a split has."""
        return self.identity["recipe"]["passes"] if split == "train" else 1

    def num_shards(self, split: str) -> int:
        """How many shards a split fills; every pass fills as many."""
        return self.passes(split) * -(-self.dataset.num_rows[split] // self.identity["recipe"]["samples_per_shard"])

    def write_shards(
        self, folder: Path, split: str, numbers: Collection[int] | None = None
    ) -> Iterator[tuple[Path, ShardResult]]:
        """Write shards of a split into a folder, all or those with the given numbers; in order."""
        place, recipe = splits_of(self.dataset)[split], self.identity["recipe"]
        wanted = sorted(range(self.num_shards(split)) if numbers is None else numbers)
        shards = place_shards(place, recipe["seed"], recipe["samples_per_shard"], wanted)
        tasks = shard_tasks(folder, shards, self.dataset.candidates.get(split), place.first_key)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            saved = Path(scratch) / "drawing"
            self.drawing.save(saved)
            for result in write_shards(tasks, saved, max(1, min(self.processes, len(wanted)))):
                yield folder / result.name, result

    def manifest(self, split: str, staging: Path) -> dict[str, Any]:
        """A split's manifest, by building all its shards in a staging folder; none of them is kept."""
        entries, indexes = [], []
        for path, result in self.write_shards(staging, split):
            path.unlink()
            entries.append(result.entry())
            indexes.append(result.index)
        return self._manifest(split, staging, entries, indexes)

    def manifest_from(self, folder: Path, split: str, staging: Path) -> dict[str, Any] | None:
        """A split's manifest from the tars in a folder, None where one is not readable as a shard.

        It is worth something only if its hash is the recorded one: no byte of the tars has been checked.
        """
        entries, indexes = [], []
        count, passes = self.num_shards(split), self.passes(split)
        for number in range(count):
            path = folder / form.shard_name(number)
            try:
                index, size = index_of_tar(path), path.stat().st_size
            except (InputError, OSError):
                return None
            indexes.append(index)
            entries.append(
                {"pass": number * passes // count, "samples": len(index), "bytes": size, "sha256": sha256_file(path)}
            )
        return self._manifest(split, staging, entries, indexes)

    def _manifest(
        self, split: str, staging: Path, entries: Sequence[Mapping[str, Any]], indexes: Sequence[ShardIndex]
    ) -> dict[str, Any]:
        index = write_index(staging / INDEX, indexes)
        (staging / INDEX).unlink()
        return shard_set_manifest(split, self.identity, self.passes(split), entries, index)

    def write_items(self, path: Path) -> None:
        """Write items.parquet."""
        write_items(path, self.dataset.titles, self.encoder.shown)

    def info(
        self,
        manifests: Mapping[str, dict[str, Any]],
        indexes: Mapping[str, Sequence[ShardIndex]],
        items: Path,
        tokenizer: str,
    ) -> dict[str, Any]:
        """shards.json, from the manifests, indexes and items.parquet of a folder that is otherwise whole."""
        splits = {}
        for split, manifest in manifests.items():
            rows = self.dataset.rows(split)
            lengths, shortened, dropped = rows.lengths, 0, 0
            for index in indexes[split]:
                history = index.slots.astype(np.int64) - self.identity["recipe"]["num_candidates"]
                missing = lengths[np.searchsorted(rows.keys, index.keys)] - history
                shortened, dropped = shortened + int((missing > 0).sum()), dropped + int(missing.sum())
            splits[split] = split_entry(
                manifest,
                sum(int(index.tokens.sum(dtype=np.int64)) for index in indexes[split]),
                max((int(index.tokens.max(initial=0)) for index in indexes[split]), default=0),
                shortened,
                dropped,
            )
        about = {"tokenizer": tokenizer, "vocabulary": len(self.encoder.tokenizer)}
        return shards_info(self.identity, about, title_counts(self.encoder), splits, items)


def index_of_tar(path: Path) -> ShardIndex:
    """A shard's index from its tar alone.

    Raises:
        InputError: not a readable tar of samples (names the file).
    """
    rows: list[tuple[int, ...]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                file = tar.extractfile(member)
                payload = b"" if file is None else file.read()
                sample = unpack(payload)
                answer = sample.answer_end - sample.answer_start
                lengths = len(sample.tokens), len(sample.slot_items), answer
                rows.append((sample.key, member.offset_data, len(payload), *lengths, zlib.crc32(payload)))
        columns = np.array(rows, dtype=np.int64).reshape(-1, 7).T
    except (tarfile.TarError, InputError, ValueError, OverflowError, EOFError) as error:
        raise InputError(f"{path}: not a readable shard ({error})") from None
    keys, offsets, sizes, tokens, slots, answers, crc32 = columns
    return ShardIndex(keys.astype(np.uint64), offsets, sizes, tokens, slots, answers, crc32)
