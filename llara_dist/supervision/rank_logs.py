"""Everything that a rank prints, also in OUT/logs/rank-00017.log: Python, native code (NCCL, CUDA), faulthandler.

File descriptors 1 and 2 lead into pipes, whose other end a small process reads (`relay.py`). It copies to where the
rank's output went before, whatever the launcher made of it, and into the log. Being another process it reads what is
left when the rank is killed; the log's disk may be full or hang without holding up a step. A log is begun by who holds
the run's lock: until then what is printed waits in the relay's memory, and a job that is refused leaves none.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Self

from llara_dist.console import warn
from llara_dist.distributed import Job, World
from llara_dist.errors import InputError, RankLostError, RequeueError, RunFailedError
from llara_dist.supervision import relay

LOGS = "logs"
DRAIN_S = 3.0
"""longest that the end of a rank waits for its log"""
_LONGEST_TEXT = 30_000
_ONE_LINE = (InputError, RequeueError, RankLostError, RunFailedError)
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT}


def log_path(out: Path, rank: int) -> Path:
    """A rank's log, appended to over all starts of the run."""
    return Path(out) / LOGS / f"rank-{rank:05d}.log"


class RankLog:
    """Copies what this process prints while it is entered; a process group's every rank enters its own.

    Rank 0 keeps a stream that is a terminal (a progress bar draws there, a person may debug there): that one is not
    copied. Where no relay can be started, the run goes on without a log.

    Args:
        world: where this process stands.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._consoles: dict[int, int] = {}  # by descriptor 1 or 2, where it led before
        self._sources: list[tuple[int, int]] = []  # a pipe's reading end, and the descriptor that leads into the pipe
        self._buffering: list[tuple[io.TextIOWrapper, bool]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: threading.Thread | None = None
        self._control: socket.socket | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        global _current
        _fill_closed_streams()
        copied = [number for number in (1, 2) if self._is_copied(number)]
        if not copied:
            return self
        _flush()
        try:
            self._start(copied)
        except OSError as error:
            self._restore()
            warn(f"rank {self._world.rank}: no log of what it prints: {error}")
            return self
        for stream in (sys.stdout, sys.stderr):
            # What was printed reaches the relay line by line, so that a kill loses none of it.
            if isinstance(stream, io.TextIOWrapper) and _number(stream) in copied:
                self._buffering.append((stream, stream.line_buffering))
                stream.reconfigure(line_buffering=True)
        self._watcher = threading.Thread(target=self._outlive_the_relay, name="rank log", daemon=True)
        self._watcher.start()
        _current = self
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        global _current
        if self._process is None:
            return
        _flush()
        for stream, line_buffering in self._buffering:
            stream.reconfigure(line_buffering=line_buffering)
        self._restore()
        self._order({"text": f"=== {_now()} {_ending(error)}\n"})
        self.drain()
        _current = None
        if self._control is not None:
            self._control.close()

    def begin(self, out: Path, job: Job) -> None:
        """From now on there is a log, with all that was printed since this was entered.

        Args:
            out: the run's folder, which this start holds.
            job: of this process.
        """
        scheduled = f", job {job.name} (restart {job.restart})" if job.name else ""
        header = f"=== {_now()} rank {self._world.rank} of {self._world.size} on {socket.gethostname()}"
        path = str(log_path(out.resolve(), self._world.rank))
        self._order({"path": path, "header": f"{header}, pid {os.getpid()}{scheduled}\n"})

    def drain(self) -> None:
        """Wait until all that was printed so far is where it belongs; for DRAIN_S at most."""
        answer = b""
        try:
            if self._order({"drain": DRAIN_S / 2}) and self._control is not None:
                answer = self._control.recv(relay.CHUNK)
        except TimeoutError:
            return
        except OSError:  # the relay is gone
            pass
        if not answer and self._watcher is not None:
            self._watcher.join(DRAIN_S)

    def _is_copied(self, number: int) -> bool:
        return not (self._world.is_main and os.isatty(number))

    def _start(self, copied: list[int]) -> None:
        """Start the relay and let the streams lead into it.

        Two streams that lead to the same place share a pipe: their order stays as it was printed.
        """
        together = len(copied) == 2 and os.path.sameopenfile(1, 2)
        consoles = {number: os.dup(number) for number in copied}
        self._consoles = consoles
        pipes = [os.pipe() for _ in ([1] if together else copied)]
        self._sources = [(source, number) for (source, _), number in zip(pipes, copied, strict=False)]
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pairs = [(source, consoles[number]) for source, number in self._sources]
        given = [theirs.fileno(), *(descriptor for pair in pairs for descriptor in pair)]
        # What stops a rank is not for its relay, which ends when the rank has: blocked here, the signals are blocked
        # there for good. Its own session keeps it out of reach of Ctrl-C and of who kills a process group.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(relay.__file__).resolve()), *map(str, given)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                pass_fds=given,
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            if self._process is None:
                for end in (end for pipe in pipes for end in pipe):
                    os.close(end)
                self._sources = []
        self._control.settimeout(DRAIN_S)
        for place, number in enumerate(copied):
            os.dup2(pipes[0 if together else place][1], number)
        for _, end in pipes:
            os.close(end)

    def _restore(self) -> None:
        """Let the streams lead where they led before."""
        with self._lock:
            for number, console in self._consoles.items():
                os.dup2(console, number)
                os.close(console)
            self._consoles = {}

    def _outlive_the_relay(self) -> None:
        """If the relay is killed the rank prints as before: a pipe without a reader would end or block it.

        This process holds the pipes' reading ends as well, and does for what is in them what the relay would have done.
        Where the relay has ended because the rank's output has, there is nothing in them.
        """
        assert self._process is not None
        self._process.wait()
        self._restore()
        pouring = [threading.Thread(target=_pour, args=pair, name="rank log", daemon=True) for pair in self._sources]
        for thread in pouring:
            thread.start()
        for thread in pouring:
            thread.join()

    def _order(self, order: dict[str, Any]) -> bool:
        """Tell the relay; whether it was there to be told."""
        if self._control is None:
            return False
        try:
            self._control.send(json.dumps(order).encode())
        except OSError:
            return False
        return True


_current: RankLog | None = None


def drain() -> None:
    """Before this process exits at once: wait, for DRAIN_S at most, until its log holds what it printed."""
    if _current is not None:
        _current.drain()


def _pour(source: int, number: int) -> None:
    """Copy a pipe to a descriptor until its last writer is gone."""
    os.set_blocking(source, True)
    with open(source, "rb", buffering=0) as pipe:
        while data := pipe.read(relay.CHUNK):
            relay.write_all(number, data)


def _fill_closed_streams() -> None:
    """Where a stream is closed, as of a daemon, lead it to nowhere: its number would be the next pipe's."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or no stream at all
            stream.flush()


def _number(stream: io.TextIOWrapper) -> int:
    try:
        return stream.fileno()
    except OSError:
        return -1


def _ending(error: BaseException | None) -> str:
    if error is None:
        return "ended"
    if isinstance(error, _ONE_LINE):
        return f"ended: {error}"
    return f"ended by {type(error).__name__}\n{''.join(traceback.format_exception(error))[-_LONGEST_TEXT:].rstrip()}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
