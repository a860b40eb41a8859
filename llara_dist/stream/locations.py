"""From a path or URL to samples: local folders, object stores behind a node cache, mixtures of both."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from llara_dist.config import DataConfig
from llara_dist.console import GIB
from llara_dist.data import shards as form
from llara_dist.errors import InputError
from llara_dist.stream.cache import CachedFile, NodeCache
from llara_dist.stream.folder import File, Folder, LocalFolder
from llara_dist.stream.mixture import MIXTURE, Mixture, describe_mixture, parse_weight, write_mixture
from llara_dist.stream.reader import Samples, ShardSet
from llara_dist.stream.remote import RemoteFolder, is_url


@dataclass(frozen=True)
class CachedFolder:
    """A folder at a URL; its files are read from copies in the node's cache."""

    remote: RemoteFolder
    cache: NodeCache

    def folder(self, name: str) -> CachedFolder:
        """A folder in this one."""
        return CachedFolder(self.remote.folder(name), self.cache)

    def shown(self, name: str) -> str:
        """A file's address for messages, without credentials."""
        return self.remote.shown(name)

    def read(self, name: str) -> bytes:
        """A small file whole, not kept in the cache."""
        return self.remote.read(name, self.cache.retry)

    def cached(self, file: File) -> CachedFile:
        """The file as the cache knows it."""
        return CachedFile(self.remote, file.name, file.bytes, file.sha256)

    def local(self, file: File) -> Path:
        """The verified copy's path."""
        return self.cache.fetch(self.cached(file))

    def open(self, file: File) -> int:
        """A descriptor for reading; the copy stays as long as it is open."""
        return self.cache.open(self.cached(file))

    def discard(self, file: File) -> bool:
        """Give up the node's copy if it is damaged."""
        return self.cache.discard(self.cached(file))


def absolute_location(location: str) -> str:
    """The same place named from the root; a URL stays as it is."""
    return location if is_url(location) else str(Path(location).resolve())


def cache_folder(settings: DataConfig) -> Path:
    """Where the node keeps copies: as set, else under the folder for temporary files ($TMPDIR)."""
    if settings.cache != Path():
        return settings.cache
    return Path(tempfile.gettempdir()) / f"llara_dist-cache-{os.getuid()}"


def node_cache(settings: DataConfig) -> NodeCache:
    """The node's cache as a run's settings have it."""
    limit = int(settings.cache_limit_gib * GIB) if settings.cache_limit_gib else None
    return NodeCache(cache_folder(settings), limit)


def open_folder(location: str, cache: NodeCache) -> Folder:
    """The folder at a path or URL.

    Raises:
        InputError: a URL with credentials in it, of an unknown scheme, or whose library is missing.
    """
    return CachedFolder(RemoteFolder.open(location), cache) if is_url(location) else LocalFolder(Path(location))


def open_samples(location: str | Path, split: str, cache: NodeCache) -> Samples:
    """Open a split of the shards folder or mixture at a path or URL.

    Raises:
        InputError: it cannot be opened (names the file).
    """
    place = str(location)
    folder = open_folder(place, cache)
    if isinstance(folder, LocalFolder) and (folder.path / MIXTURE).is_file():
        return Mixture.open(folder, split, lambda source: open_folder(source, cache))
    return ShardSet.open(folder, split)


def parts_of(samples: Samples) -> tuple[ShardSet, ...]:
    """The shard sets in the order of `samples.sources`."""
    if isinstance(samples, Mixture):
        return samples.parts
    assert isinstance(samples, ShardSet)
    return (samples,)


def is_remote(samples: Samples) -> bool:
    """Whether any part is read through the node's cache."""
    return any(isinstance(part.folder, CachedFolder) for part in parts_of(samples))


def mix(shards: list[str], out: Path, weights: list[float | str] | None = None) -> dict[str, Any]:
    """Join the shards of several data sets into one mixture, which training takes as its shards.

    Join the item tables in the same order: `llara-dist recommender join`.

    Args:
        shards: shards folders or URLs, in the order of the joined item table.
        out: the mixture's folder to make.
        weights: passes that an epoch reads of each source, 1 by default: 0.5 (or 1/2) = half of a pass, another half in
            the next epoch; 2 = two passes.

    Returns:
        mixture.json as written.

    Raises:
        InputError: a source cannot be opened or does not fit the others, or a weight is no positive number.
    """
    if not shards:
        raise InputError("--shards: name at least one shards folder")
    given = [parse_weight(str(weight)) for weight in weights] if weights else [Fraction(1)] * len(shards)
    if len(given) != len(shards):
        raise InputError(f"--weights: {len(given)} weights for {len(shards)} shards folders")
    cache = node_cache(DataConfig())
    places, infos = [], []
    for place in shards:
        folder = open_folder(place, cache)
        infos.append(form.parse_shards_info(folder.read(form.SHARDS), folder.shown(form.SHARDS)))
        # Relative, so that a mixture and its local sources can move together.
        places.append(place if is_url(place) else os.path.relpath(Path(place).resolve(), Path(out).resolve()))
    mixture = describe_mixture(places, infos, given)
    write_mixture(Path(out), mixture)
    return {"out": str(out), **mixture}
