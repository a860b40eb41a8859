"""Several data sets as one: `llara-dist shards mix`, and a mixture's split open for reading.

A mixture is a folder with one sealed `mixture.json`: where each source's shards are, which (by hash), its weight and
where its items begin in the concatenated item tables. Sample ids, keys and item ids of a mixture are the sources' own
plus an offset, so that everything after the reader works as with one data set.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist import console
from llara_dist.data import shards as form
from llara_dist.data.samples import Sample
from llara_dist.errors import InputError
from llara_dist.integrity import sha256_json, staged_folder, write_json
from llara_dist.stream.folder import Folder
from llara_dist.stream.order import Source
from llara_dist.stream.reader import SampleInfo, ShardSet
from llara_dist.stream.remote import is_url

MIXTURE = "mixture.json"
_KEY_BITS = 48
"""a mixture's key is the source's number above the source's own key"""


@dataclass(frozen=True)
class Mixture:
    """One split of a mixture, open for reading; like `ShardSet`, over several of them."""

    info: dict[str, Any]
    """mixture.json: dataset, tokenizer_hash, num_items, sources"""
    parts: tuple[ShardSet, ...]

    @classmethod
    def open(cls, folder: Folder, split: str, open_folder: Callable[[str], Folder]) -> Mixture:
        """Open a split of every source.

        Args:
            folder: holds mixture.json.
            split: train, val or test.
            open_folder: from a source's path or URL to its folder.

        Raises:
            InputError: a source cannot be opened, or is not the one that was mixed.
        """
        shown = folder.shown(MIXTURE)
        info = form.parse_sealed(folder.read(MIXTURE), shown, "a mixture (made by `llara-dist shards mix`)")
        parts = []
        for source in info["sources"]:
            place = source["shards"]
            if not is_url(place) and not os.path.isabs(place):
                place = str(Path(folder.shown("")) / place)
            part = ShardSet.open(open_folder(place), split)
            if part.info["hash"] != source["hash"]:
                raise InputError(
                    f"{shown}: source {source['name']}: {source['shards']} was built again since; "
                    "run `llara-dist shards mix` again"
                )
            parts.append(part)
        return cls(info, tuple(parts))

    def __len__(self) -> int:
        return int(self.first_ids[-1])

    @property
    def hash(self) -> str:
        """Names the content: the sources, their weights and order."""
        return self.info["hash"]

    @property
    def longest(self) -> int:
        """Positions of the longest row, in the hybrid form."""
        return max(part.longest for part in self.parts)

    @cached_property
    def first_ids(self) -> np.ndarray:
        """int64 [sources+1]: the first sample of each source, then the number of samples."""
        return np.concatenate([[0], np.cumsum([len(part) for part in self.parts])]).astype(np.int64)

    @property
    def sources(self) -> tuple[Source, ...]:
        """What a plan is made of."""
        return tuple(
            dataclasses.replace(own, first_ids=own.first_ids + first, weight=Fraction(source["weight"]))
            for part, first, source in zip(self.parts, self.first_ids[:-1].tolist(), self.info["sources"], strict=True)
            for own in part.sources
        )

    def lookup(self, ids: np.ndarray) -> SampleInfo:
        """What the indexes say of samples, int64 [n] in any order.

        Raises:
            InputError: an index is damaged there.
        """
        ids = np.asarray(ids, dtype=np.int64)
        found = SampleInfo.empty(len(ids))
        owner = np.searchsorted(self.first_ids, ids, side="right") - 1
        for number, part in enumerate(self.parts):
            mine = np.flatnonzero(owner == number)
            info = part.lookup(ids[mine] - self.first_ids[number])
            for name, values in vars(info).items():
                getattr(found, name)[mine] = values
            found.keys[mine] += np.uint64(number << _KEY_BITS)
        return found

    @property
    def all(self) -> SampleInfo:
        """The whole split; for splits that are small enough to be looked at whole."""
        return self.lookup(np.arange(len(self)))

    def read(self, ids: Iterable[int]) -> list[Sample]:
        """Read samples in the given order; items count through the concatenated item tables.

        Raises:
            InputError: a sample's bytes are short or have another crc32 (names shard, offset, key).
        """
        wanted = np.fromiter(ids, dtype=np.int64)
        owner = np.searchsorted(self.first_ids, wanted, side="right") - 1
        samples: list[Any] = [None] * len(wanted)
        for number, part in enumerate(self.parts):
            mine = np.flatnonzero(owner == number)
            offset = self.info["sources"][number]["item_offset"]
            for place, sample in zip(mine, part.read(wanted[mine] - self.first_ids[number]), strict=True):
                key = sample.key + (number << _KEY_BITS)
                samples[place] = sample._replace(key=key, slot_items=sample.slot_items + np.int32(offset))
        return samples

    def titles(self) -> list[str]:
        """By item id, the titles as the prompts show them; the same title may be in several sources."""
        return [title for part in self.parts for title in part.titles()]

    def close(self) -> None:
        """Close this process's file descriptors; reading opens them again."""
        for part in self.parts:
            part.close()


def parse_weight(text: str) -> Fraction:
    """A weight as written: "1", "0.3", "1/3".

    Raises:
        InputError: not a positive number.
    """
    try:
        weight = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"--weights: {text!r} is no number; give e.g. 1, 0.3 or 1/3") from None
    if weight <= 0:
        raise InputError(f"--weights: {text} must be positive; leave the source out instead")
    return weight


def describe_mixture(places: list[str], infos: list[dict[str, Any]], weights: list[Fraction]) -> dict[str, Any]:
    """The content of `mixture.json`, sealed.

    Args:
        places: the sources' shards folders as they shall be written down.
        infos: their shards.json.
        weights: passes that an epoch reads.

    Raises:
        InputError: sources that cannot be one run's: other tokenizers, or the same data set twice.
    """
    first = infos[0]
    for place, info in zip(places, infos, strict=True):
        if info["tokenizer_hash"] != first["tokenizer_hash"]:
            raise InputError(
                f"{place}: built with tokenizer {info['tokenizer_hash'][:12]}, {places[0]} with "
                f"{first['tokenizer_hash'][:12]}; build all sources with the same --tokenizer"
            )
    hashes = [info["dataset"]["hash"] for info in infos]
    for number, each in enumerate(hashes):
        if each in hashes[:number]:
            raise InputError(
                f"{places[number]}: the same data set as {places[hashes.index(each)]}; give it once, with more weight"
            )
    offsets = np.concatenate([[0], np.cumsum([info["num_items"] for info in infos])]).tolist()
    name = "+".join(info["dataset"]["name"] for info in infos)
    return form.seal(
        {
            "format_version": form.FORMAT_VERSION,
            "dataset": {"name": name, "hash": sha256_json(hashes)},
            "tokenizer_hash": first["tokenizer_hash"],
            "num_items": offsets[-1],
            "sources": [
                {
                    "name": info["dataset"]["name"],
                    "shards": place,
                    "hash": info["hash"],
                    "dataset_hash": info["dataset"]["hash"],
                    "weight": str(weight),
                    "item_offset": offset,
                    "num_items": info["num_items"],
                    "samples": info["splits"]["train"]["samples"],
                    "passes": info["splits"]["train"]["passes"],
                }
                for place, info, weight, offset in zip(places, infos, weights, offsets[:-1], strict=True)
            ],
        }
    )


def write_mixture(out: Path, mixture: dict[str, Any]) -> None:
    """Write a mixture's folder, whole or not at all, and show it."""
    with staged_folder(out) as staging:
        write_json(staging / MIXTURE, mixture)
    rows = [
        [source["name"], f"{source['samples']:,}", source["passes"], source["weight"], source["item_offset"]]
        for source in mixture["sources"]
    ]
    console.table(f"{out}: {mixture['dataset']['name']}", ["source", "samples", "passes", "weight", "items from"], rows)
