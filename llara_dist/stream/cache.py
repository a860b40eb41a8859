"""The node cache: files of any origin, named by their sha256, fetched once a node, verified before they are there.

Everything between processes goes through flock, which the kernel drops when a process dies, however it dies:

- `.{sha256}.part` is a download. Its lock, held exclusively, is the right to download that file; those who want the
  same file wait for it. The lock lies on the staging file itself, so there are no lock files to clean up, and what a
  killed process left is taken over by the next one that wants the file, or evicted. A `.part` has its whole size from
  the beginning (sparse), so that its room is taken.
- `{sha256}` is a file, verified. A reader's descriptor holds the lock shared; who can have it exclusively may evict.
- `.space`, held for moments, orders whatever adds to the cache, renames or evicts: who holds it sees one state.

A path may change hands between open and flock, so each lock is followed by a look whether the path still names that
file. A `.part` is renamed or unlinked only by who holds its lock, a file is unlinked only by who holds `.space`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llara_dist.console import GIB
from llara_dist.errors import InputError
from llara_dist.integrity import fsync_folder
from llara_dist.stream.remote import RemoteFolder, Retry, TransferError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SPACE = ".space"
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class CachedFile:
    """A remote file and what it must be."""

    remote: RemoteFolder
    name: str
    """inside the remote folder"""
    size: int
    """bytes"""
    sha256: str
    """lower-case hex"""

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):  # it becomes a file name, and it comes from a manifest
            raise InputError(f"{self.shown}: sha256 {self.sha256!r} is not 64 hex digits; rebuild the manifest")
        if self.size < 0:
            raise InputError(f"{self.shown}: {self.size} bytes; rebuild the manifest")

    @property
    def shown(self) -> str:
        """The redacted address, for messages."""
        return self.remote.shown(self.name)


class CacheFull(InputError):
    """A file does not fit below the limit, and all that is there is in use."""


class Stopped(Exception):
    """A fetch was given up because its `stop` was set."""


class NodeCache:
    """Files on the node's disk, shared by all its processes; picklable, as it has no state but its settings.

    Args:
        folder: on a disk that supports flock, the node's own where there is one.
        limit_bytes: the cache never holds more than this, downloads in progress included; None for no limit.
        attempts: how often to try a download that fails or brings other bytes than it must.
        backoff_seconds: upper end of the pause before the second attempt, doubled for each one after.
    """

    def __init__(
        self, folder: Path, limit_bytes: int | None = None, attempts: int = 5, backoff_seconds: float = 0.5
    ) -> None:
        if attempts < 1 or (limit_bytes is not None and limit_bytes < 1):
            raise InputError(f"node cache {folder}: {attempts} attempts, limit {limit_bytes} bytes; must be at least 1")
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self.retry = Retry(attempts, backoff_seconds)

    def fetch(self, file: CachedFile) -> Path:
        """The verified local copy; fetched if it is not there. It may be evicted later: `open` keeps it.

        Raises:
            InputError: see `open`.
        """
        os.close(self.open(file))
        return self.folder / file.sha256

    def open(self, file: CachedFile, stop: threading.Event | None = None) -> int:
        """A descriptor for reading; the file is not evicted while any process holds one.

        Args:
            file: fetched if it is not there. A copy that is there was verified when it came; its size is checked again.
            stop: set from another thread to give up.

        Raises:
            InputError: missing, refused, or not to be had whole in the given attempts (names address, bytes, hash); or
                the cache's folder cannot be used.
            CacheFull: no room.
            Stopped: `stop` was set.
        """
        try:
            while True:
                descriptor = self._open_present(file)
                if descriptor is None:
                    descriptor = self._download(file, stop)
                if descriptor is not None:
                    return descriptor
        except OSError as error:
            problem = error.strerror or str(error)
        raise InputError(
            f"{file.shown}: cannot be kept in the cache {self.folder} ({problem}); free the disk, or set "
            "data.cache to a folder on a local disk that can be written to",
            everywhere=False,
        )

    def discard(self, file: CachedFile) -> bool:
        """Have the next fetch get a file anew, if the copy here is damaged.

        The copy is hashed again: of many readers that found the damage, only the first removes it, and one that found
        bytes that are as published (an index that is wrong) does not fetch for ever.

        Returns:
            Whether the copy was damaged and is removed, or is gone already.
        """
        path = self.folder / file.sha256
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as opened:
            with contextlib.suppress(OSError):  # a bad block of the disk is damage too
                if hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256:
                    return False
            self._drop(opened.fileno(), path)
        return True

    def usage(self) -> int:
        """Bytes that the cache takes; a download in progress counts with its whole size."""
        if not self.folder.is_dir():
            return 0
        with self._space():
            return sum(size for _, size, _ in self._entries())

    def _open_present(self, file: CachedFile) -> int | None:
        """A leased descriptor of the copy that is here, or None."""
        path = self.folder / file.sha256
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with _closed_unless_kept(descriptor) as kept:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not _is_at(descriptor, path):
                return None  # evicted between the two
            if os.fstat(descriptor).st_size != file.size:
                self._drop(descriptor, path)
                return None
            os.utime(descriptor)  # eviction goes by the last use
            return kept()

    def _download(self, file: CachedFile, stop: threading.Event | None) -> int | None:
        """Become the file's one downloader; a leased descriptor, or None where another one was (look again)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part, path = self.folder / f".{file.sha256}.part", self.folder / file.sha256
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with _closed_unless_kept(descriptor) as kept:
            if not _become_downloader(descriptor, part, stop):
                return None
            try:
                if path.exists():
                    return None
                self._take_room(descriptor, file)
                self.retry.run(lambda: self._attempt(descriptor, file, stop), file.shown, _sleeper(stop))
                os.fsync(descriptor)
                with self._space():
                    os.rename(part, path)
            finally:
                # Still ours: others that want this path wait for the lock. After the rename it is another's.
                if _is_at(descriptor, part):
                    part.unlink()
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # from here on it is a lease
            fsync_folder(self.folder)
            # The kernel drops the old lock before it takes the new one: an eviction fits in between.
            return kept() if _is_at(descriptor, path) else None

    def _attempt(self, descriptor: int, file: CachedFile, stop: threading.Event | None) -> None:
        """One transfer into the staging file, verified; over what an earlier attempt left, so that its room is kept."""
        os.lseek(descriptor, 0, os.SEEK_SET)
        digest, received = hashlib.sha256(), 0
        try:
            with (
                contextlib.closing(file.remote.stream(file.name)) as chunks,
                open(descriptor, "wb", closefd=False) as out,
            ):
                for chunk in chunks:
                    if stop is not None and stop.is_set():
                        raise Stopped
                    received += len(chunk)
                    if received > file.size:
                        break
                    digest.update(chunk)
                    out.write(chunk)
        except TransferError as error:
            seen = "" if error.final else f" after {received} of {file.size} bytes"
            raise TransferError(f"{error}{seen}", error.final) from None
        if received != file.size:
            seen = "more came than the" if received > file.size else f"the transfer ended early, {received} of the"
            raise TransferError(f"{seen} {file.size} bytes that the manifest names")
        if digest.hexdigest() != file.sha256:
            raise TransferError(f"other bytes came than the manifest names: sha256 {digest.hexdigest()}")

    def _take_room(self, descriptor: int, file: CachedFile) -> None:
        """Give the staging file its size, evicting the least recently used where the limit asks for it.

        Raises:
            CacheFull: what is left is in use.
        """
        with self._space():
            if self.limit_bytes is not None:
                own = f".{file.sha256}.part"
                entries = [entry for entry in self._entries() if entry[2].name != own]
                used = sum(size for _, size, _ in entries)
                for _, size, path in sorted(entries):
                    if used + file.size <= self.limit_bytes:
                        break
                    if _evict(path):
                        used -= size
                if used + file.size > self.limit_bytes:
                    raise CacheFull(
                        f"{file.shown}: {file.size} bytes do not fit in the cache {self.folder}: limit "
                        f"{self.limit_bytes / GIB:.3g} GiB ({self.limit_bytes} bytes), {used} bytes in use; raise "
                        "data.cache_limit_gib",
                        everywhere=False,
                    )
            os.ftruncate(descriptor, file.size)

    def _drop(self, descriptor: int, path: Path) -> None:
        """Unlink a damaged file, unless another process did and a good one is there already."""
        with self._space():
            if _is_at(descriptor, path):
                path.unlink()

    def _entries(self) -> list[tuple[int, int, Path]]:
        """(last use ns, bytes, path) of files and downloads; `.space` is held, or a rename is seen twice or never."""
        entries = []
        with os.scandir(self.folder) as scan:
            for entry in scan:
                if _SHA256.fullmatch(entry.name.removeprefix(".").removesuffix(".part")):
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat()
                        entries.append((stat.st_mtime_ns, stat.st_size, Path(entry.path)))
        return entries

    @contextlib.contextmanager
    def _space(self) -> Iterator[None]:
        descriptor = os.open(self.folder / _SPACE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the file that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _evict(path: Path) -> bool:
    """Unlink a file that nobody reads, or a download that nobody makes any more; `.space` must be held."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(descriptor, path):
            return False
        path.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _become_downloader(descriptor: int, part: Path, stop: threading.Event | None) -> bool:
    """Wait for the right to download: true with the lock held, false when another process has finished meanwhile."""
    sleep = _sleeper(stop)
    while _is_at(descriptor, part):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _is_at(descriptor, part)
        # No blocking wait: once the download is renamed, its readers' leases lie on this very file and keep the lock.
        sleep(_POLL_SECONDS)
    return False


def _sleeper(stop: threading.Event | None) -> Callable[[float], None]:
    def sleep(seconds: float) -> None:
        if stop is None:
            time.sleep(seconds)
        elif stop.wait(seconds):
            raise Stopped

    return sleep


@contextlib.contextmanager
def _closed_unless_kept(descriptor: int) -> Iterator[Callable[[], int]]:
    """Closes a descriptor at the end, unless the function it gives was called, which returns it."""
    keep = False

    def kept() -> int:
        nonlocal keep
        keep = True
        return descriptor

    try:
        yield kept
    finally:
        if not keep:
            os.close(descriptor)
