"""Where a rank stands, in memory that outlives it: what its status file said last may be some steps old.

A page of a memory file system (/dev/shm), mapped by the rank, readable by the other ranks of its host. It takes the
loop microseconds to write, never waits for a disk or a network, and stays when the rank is killed or suspended.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import struct
import tempfile
import time
from pathlib import Path

from llara_dist.supervision.process_identity import process_state
from llara_dist.supervision.progress import KEYS_SHOWN, Phase, Progress

_HEADER = struct.Struct("<QQQ")  # writes so far, pid, the process's start
_SLOT = struct.Struct(f"<BBqqq{KEYS_SHOWN}q")  # phase, keys shown, step, micro-batch, keys, the keys shown
_PREFIX = "llara_dist"
_PHASES = tuple(Phase)

READ_WITHIN_S = 600.0
"""seconds; within them the ranks of a run have found that one is gone, and said where it was"""


def shared_place_path(token: str, rank: int) -> Path:
    """The page of a rank of this host.

    Args:
        token: of the start.
        rank: which.
    """
    return _folder() / f"{_PREFIX}.{token}.{rank}"


class SharedPlace:
    """This rank's page; the main thread writes it.

    Two slots take turns, and which one holds is written last: a kill in mid-write leaves the place before.

    Args:
        token: of the start; nobody else may know it, since the folder is everybody's.
        rank: of this process.

    Raises:
        OSError: the page cannot be made.
    """

    def __init__(self, token: str, rank: int) -> None:
        self.path = shared_place_path(token, rank)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, mmap.PAGESIZE)  # a full file system fails here, not in mid-loop
            self._map = mmap.mmap(descriptor, mmap.PAGESIZE)
        finally:
            os.close(descriptor)
        self._writes = 0
        self._owner = (os.getpid(), process_state(os.getpid())[1])
        self.write(Progress())

    def write(self, progress: Progress) -> None:
        """Set the place."""
        keys = progress.keys
        _SLOT.pack_into(
            self._map,
            _slot_offset(self._writes + 1),
            _PHASES.index(progress.phase),
            len(keys),
            progress.step,
            progress.microbatch,
            progress.num_keys,
            *keys,
            *(0,) * (KEYS_SHOWN - len(keys)),
        )
        self._writes += 1
        _HEADER.pack_into(self._map, 0, self._writes, *self._owner)

    def remove(self) -> None:
        """Take the page's name away; the mapping stays writable until the process ends."""
        self.path.unlink(missing_ok=True)


def read_shared_place(token: str, rank: int) -> Progress | None:
    """Where a rank of this host stands or stood; None where it has no page here."""
    try:
        data = shared_place_path(token, rank).read_bytes()
        writes, _, _ = _HEADER.unpack_from(data)
        phase, shown, step, microbatch, num_keys, *keys = _SLOT.unpack_from(data, _slot_offset(writes))
    except (OSError, struct.error):
        return None
    return Progress(_PHASES[phase], step, microbatch, tuple(keys[:shown]), num_keys)


def ranks_of_this_host(token: str) -> list[int]:
    """The ranks of a start that have a page here, living or not."""
    return sorted(int(path.name.rpartition(".")[2]) for path in _folder().glob(f"{_PREFIX}.{token}.*"))


def remove_abandoned_places() -> None:
    """Remove the pages of this user's killed processes, once nobody will read them any more.

    The other ranks of a run may be about to: a page without its process is made read-only, which dates it, and removed
    by whoever starts `READ_WITHIN_S` later.
    """
    for path in _folder().glob(f"{_PREFIX}.*"):
        with contextlib.suppress(OSError, struct.error):
            _, pid, started = _HEADER.unpack_from(path.read_bytes())
            state, now_started = process_state(pid)
            if not pid or (state != "" and now_started == started):  # no pid: a page that is just being made
                continue
            found = path.stat()
            if found.st_mode & stat.S_IWUSR:
                path.chmod(stat.S_IRUSR)
            elif time.time() - found.st_ctime >= READ_WITHIN_S:
                path.unlink(missing_ok=True)


def _slot_offset(writes: int) -> int:
    return _HEADER.size + (writes % 2) * _SLOT.size


def _folder() -> Path:
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
