"""Look-ahead: what the plan needs soon is brought into the node cache, and kept there until its last step is done."""

from __future__ import annotations

import heapq
import logging
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

from llara_dist.errors import InputError
from llara_dist.stream.cache import CachedFile, CacheFull, NodeCache, Stopped
from llara_dist.stream.remote import redact

_MAX_FILES_AHEAD = 256
"""each is an open descriptor; the usual limit of a process is 1,024 files"""
_MAX_NEEDS_AHEAD = 4096
"""needs of files that are held already cost no bytes; this keeps them from being drawn without end"""
_CLOSE_SECONDS = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Need:
    """A file that some steps read."""

    first_step: int
    last_step: int
    """inclusive"""
    file: CachedFile


@dataclass
class _Lease:
    """A file that is held, on its way, or could not be had (then it takes its place all the same)."""

    file: CachedFile
    last_step: int
    order: int
    """when it was drawn; unique"""
    descriptor: int | None = None


class Prefetcher:
    """Fetches the files of a plan ahead of its steps, and holds them so that eviction leaves them alone.

    To run in one process of a node: its leases and files count for all. `ahead_bytes` should leave room below the
    cache's limit for what readers hold. A file that cannot be had is left to its reader, who will meet the error and
    raise it.

    Args:
        cache: the node's.
        needs: in plan order (by first step); drawn no further than the look-ahead reaches.
        ahead_bytes: how much is held at once; one file is held whatever its size.
        downloads: how many at the same time.
    """

    def __init__(self, cache: NodeCache, needs: Iterable[Need], ahead_bytes: int, downloads: int = 4) -> None:
        if downloads < 1:
            raise ValueError(f"downloads must be at least 1, not {downloads}")
        self._cache = cache
        self._needs = iter(needs)
        self._ahead_bytes = ahead_bytes
        self._waiting: Need | None = None
        """drawn, but beyond the horizon"""
        self._leases: dict[str, _Lease] = {}
        """sha256 → lease"""
        self._bytes = 0
        """of all leases"""
        self._drawn = 0
        self._queue: list[tuple[int, _Lease]] = []
        """heap of (order, lease): those for which there was no room"""
        self._ends: list[tuple[int, str]] = []
        """heap of (last step, sha256) of every need from now to the horizon"""
        self._step = 0
        self._full = False
        """the cache had no room: wait for the next step"""
        self._complained = False
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"prefetch-{number}", daemon=True) for number in range(downloads)
        ]

    def start(self) -> None:
        """Begin with the needs of step 0, or of the step that `at_step` named."""
        for thread in self._threads:
            thread.start()

    def at_step(self, step: int) -> None:
        """Say that steps before `step` are done everywhere on the node: what only they needed is released."""
        with self._changed:
            self._step = max(self._step, step)
            while self._ends and self._ends[0][0] < self._step:
                _, sha256 = heapq.heappop(self._ends)
                lease = self._leases.get(sha256)
                if lease is not None and lease.last_step < self._step:
                    self._release(lease)
            self._full = False
            self._changed.notify_all()

    def close(self) -> None:
        """Stop, and release everything. A transfer from a server that does not answer is left to end by itself."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            for lease in list(self._leases.values()):
                self._release(lease)

    def __enter__(self) -> Prefetcher:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while (lease := self._next()) is not None:
            try:
                descriptor = self._cache.open(lease.file, self._stop)
            except Stopped:
                return
            except CacheFull:
                self._put_back(lease)
            except Exception as error:  # the look-ahead never ends a run: the file's reader meets the error
                self._complain(
                    str(error) if isinstance(error, InputError) else f"{lease.file.shown}: {type(error).__name__}"
                )
            else:
                self._keep(lease, descriptor)

    def _next(self) -> _Lease | None:
        """Wait for room below the horizon; the next file to fetch, or None at the end."""
        with self._changed:
            while not self._stop.is_set():
                lease = None if self._full else self._from_queue() or self._from_plan()
                if lease is not None:
                    return lease
                self._changed.wait()
            return None

    def _from_queue(self) -> _Lease | None:
        while self._queue:
            lease = heapq.heappop(self._queue)[1]
            if self._leases.get(lease.file.sha256) is lease:  # not released meanwhile
                return lease
        return None

    def _from_plan(self) -> _Lease | None:
        """Draw needs until one asks for a file that is not held, or the horizon is reached."""
        while len(self._ends) < _MAX_NEEDS_AHEAD:
            need = self._waiting or self._draw()
            self._waiting = None
            if need is None:
                return None
            if need.last_step < self._step:
                continue
            lease = self._leases.get(need.file.sha256)
            held = lease is not None
            if lease is None:
                beyond = self._bytes + need.file.size > self._ahead_bytes or len(self._leases) >= _MAX_FILES_AHEAD
                if self._leases and beyond:
                    self._waiting = need
                    return None
                self._drawn += 1
                lease = self._leases[need.file.sha256] = _Lease(need.file, need.last_step, self._drawn)
                self._bytes += need.file.size
            lease.last_step = max(lease.last_step, need.last_step)
            heapq.heappush(self._ends, (need.last_step, need.file.sha256))
            if not held:
                return lease
        return None

    def _draw(self) -> Need | None:
        try:
            return next(self._needs, None)
        except Exception as error:  # as above: readers go on without the look-ahead
            self._needs = iter(())
            self._complain(f"the plan's needs cannot be known ({type(error).__name__})")
            return None

    def _put_back(self, lease: _Lease) -> None:
        """No room in the cache: what is needed last gives way, and where nothing can, a later step tries again."""
        with self._changed:
            heapq.heappush(self._queue, (lease.order, lease))
            later = [
                other for other in self._leases.values() if other.descriptor is not None and other.order > lease.order
            ]
            if later:
                self._give_way(max(later, key=lambda other: other.order))
            else:
                self._full = True

    def _keep(self, lease: _Lease, descriptor: int) -> None:
        with self._changed:
            if self._leases.get(lease.file.sha256) is not lease or self._stop.is_set():
                os.close(descriptor)  # its steps are over already
                return
            lease.descriptor = descriptor
            if self._full and self._queue and self._queue[0][0] < lease.order:
                self._give_way(lease)

    def _give_way(self, lease: _Lease) -> None:
        """Let go of a file in favour of the first in the queue; it is asked for again after that one."""
        if lease.descriptor is not None:
            os.close(lease.descriptor)
        lease.descriptor = None
        heapq.heappush(self._queue, (lease.order, lease))
        self._full = False
        self._changed.notify_all()

    def _release(self, lease: _Lease) -> None:
        del self._leases[lease.file.sha256]
        self._bytes -= lease.file.size
        if lease.descriptor is not None:
            os.close(lease.descriptor)

    def _complain(self, problem: str) -> None:
        """Say the first error only: when a server is away, every file would say the same."""
        if not self._complained:
            self._complained = True
            _log.warning("look-ahead: %s; the step that needs it tries again", redact(problem))
