"""A shards folder wherever it lies: on a file system, or at a URL with copies in the node's cache."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llara_dist.data.shard_index import REMEDY
from llara_dist.errors import InputError


@dataclass(frozen=True)
class File:
    """A file as a manifest names it."""

    name: str
    bytes: int
    sha256: str


class Folder(Protocol):
    """What a shard set needs of the place that it lies in; picklable."""

    def folder(self, name: str) -> Folder:
        """A folder in this one."""
        ...

    def shown(self, name: str) -> str:
        """A file's address for messages, without credentials."""
        ...

    def read(self, name: str) -> bytes:
        """A small file whole. Raises InputError where it is missing."""
        ...

    def local(self, file: File) -> Path:
        """A path at which the whole file lies on this node. Raises InputError where it cannot be had."""
        ...

    def open(self, file: File) -> int:
        """A descriptor for reading; the file stays at least as long as it is open."""
        ...

    def discard(self, file: File) -> bool:
        """Give up this node's copy, found damaged; whether the file can be fetched anew."""
        ...


@dataclass(frozen=True)
class LocalFolder:
    """A folder on a file system, the node's own or one that all nodes see."""

    path: Path

    def folder(self, name: str) -> LocalFolder:
        """A folder in this one."""
        return LocalFolder(self.path / name)

    def shown(self, name: str) -> str:
        """The path."""
        return str(self.path / name)

    def read(self, name: str) -> bytes:
        """A small file whole."""
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{self.path / name}: not found; expected what `llara-dist shards build` makes") from None

    def local(self, file: File) -> Path:
        """The path; the size is compared."""
        path = self.path / file.name
        found = path.stat().st_size if path.is_file() else None
        if found != file.bytes:
            problem = "missing" if found is None else f"{found} bytes, the manifest names {file.bytes}"
            raise InputError(f"{path}: {problem}; {REMEDY}")
        return path

    def open(self, file: File) -> int:
        """A descriptor for reading."""
        path = self.path / file.name
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); {REMEDY}", everywhere=False) from None

    def discard(self, file: File) -> bool:
        """There is no other copy."""
        return False


class OpenFiles:
    """A process's descriptors by number: the longest unused is closed first, and what was not used for a while.

    The usual limit of a process is 1,024 descriptors. A descriptor of the node's cache keeps its file there, so one
    that the run has left behind must not stay open.
    """

    def __init__(self, most: int = 256, idle: int = 64) -> None:
        self.most, self.idle = most, idle
        self._files: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._time = 0

    def __len__(self) -> int:
        return len(self._files)

    def get(self, number: int, open_file: Callable[[], int]) -> int:
        """The descriptor of a number, opened if it is not."""
        if number in self._files:
            descriptor = self._files.pop(number)[0]
        else:
            while len(self._files) >= self.most:
                self._close_oldest()
            descriptor = open_file()
        self._files[number] = (descriptor, self._time)
        return descriptor

    def tick(self) -> None:
        """Another batch of reads begins; close what the last `idle` batches did not use."""
        self._time += 1
        while self._files and next(iter(self._files.values()))[1] < self._time - self.idle:
            self._close_oldest()

    def close(self, number: int | None = None) -> None:
        """Close one, or all."""
        for each in list(self._files) if number is None else [number]:
            if each in self._files:
                os.close(self._files.pop(each)[0])

    def _close_oldest(self) -> None:
        os.close(self._files.popitem(last=False)[1][0])

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[int, int]]:
        # Descriptors do not travel to other processes.
        return OpenFiles, (self.most, self.idle)
