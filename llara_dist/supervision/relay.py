"""The process beside a rank that copies what the rank prints: to where it went before, and into the rank's log.

It is a process of its own so that nothing is lost when the rank is killed, and imports nothing of the package so that
it is small (about 10 MiB) and started within milliseconds. `rank_logs.py` starts it as

    python -I -S relay.py CONTROL (SOURCE CONSOLE)…

with file descriptors: a socket for orders, and for each stream the pipe's end to read and where the stream went before.
It ends when every writer of every pipe has: the rank, and what the rank started.

Orders, one JSON object a packet: {"path", "header"} begins the log (until then what comes is kept in memory, up to a
limit), {"text"} adds a line of its own, {"drain": true} is answered with {"lost": bytes} once all that was printed
before is written.
"""

from __future__ import annotations

import collections
import json
import os
import select
import socket
import sys
import threading
from typing import Any

CHUNK = 1 << 16
LIMIT = 4 << 20
"""bytes that wait for the log's disk, or for the log to begin; what is printed beyond them is not in the log"""


class LogFile:
    """Appends to a file from a thread of its own: a disk that is full or does not answer holds up nobody.

    Attributes:
        lost: bytes that are not in the log.
    """

    def __init__(self) -> None:
        self.lost = 0
        self._waiting: collections.deque[bytes] = collections.deque()
        self._size = 0
        self._unsaid = 0
        self._changed = threading.Condition()
        self._path: str | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def begin(self, path: str, header: bytes) -> None:
        """From now on there is a file; `header` comes before everything else."""
        with self._changed:
            self._path = path
            self._waiting.appendleft(header)
            self._size += len(header)
            self._changed.notify_all()

    def add(self, data: bytes) -> None:
        """Write `data`, soon; dropped where too much waits already."""
        with self._changed:
            if self._size + len(data) > LIMIT:
                self._lose(len(data))
                return
            self._waiting.append(data)
            self._size += len(data)
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Until nothing waits any more; for so many seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._path is None or self._size == 0, seconds)

    def _lose(self, count: int) -> None:
        self.lost += count
        self._unsaid += count

    def _run(self) -> None:
        descriptor, first = -1, True
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._path is not None and self._size > 0)
                data, path = b"".join(self._waiting), self._path
                self._waiting.clear()
                missing, self._unsaid = self._unsaid, 0
            note = b"\n[%d bytes are missing here: the log could not be written]\n" % missing if missing else b""
            written = 0
            try:
                if descriptor < 0:
                    assert path is not None
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
                    if first and os.fstat(descriptor).st_size > 0:
                        note = b"\n" + note  # an earlier start may have been killed in mid-line
                    first = False
                while written < len(note + data):
                    written += os.write(descriptor, (note + data)[written:])
            except OSError:
                if descriptor >= 0:
                    os.close(descriptor)  # opened anew: its server may have been restarted
                    descriptor = -1
            with self._changed:
                self._lose(min(len(note + data) - written, len(data)))
                self._unsaid += missing if written < len(note) else 0
                self._size = sum(map(len, self._waiting))
                self._changed.notify_all()


def write_all(descriptor: int, data: bytes) -> None:
    """Write everything, as far as somebody takes it: a console that is gone must not end the run or its log."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # somebody else made the console's description non-blocking
            select.select([], [descriptor], [])
        except OSError:
            return


def relay(control: socket.socket, streams: dict[int, int]) -> None:
    """Copy until every source has ended.

    Args:
        control: brings orders.
        streams: by source, the descriptor that each is copied to.
    """
    log, consoles = LogFile(), set(streams.values())
    poll = select.poll()
    for source in (control.fileno(), *streams):
        os.set_blocking(source, False)
        poll.register(source, select.POLLIN)

    def copy(source: int) -> bool:
        """One piece of a source; False where there is none for now."""
        try:
            data = os.read(source, CHUNK)
        except BlockingIOError:
            return False
        if not data:
            poll.unregister(source)
            del streams[source]
            return False
        write_all(streams[source], data)
        log.add(data)
        return True

    def obey(order: dict[str, Any]) -> None:
        if "path" in order:
            log.begin(order["path"], order["header"].encode(errors="surrogateescape"))
        if "text" in order:
            log.add(order["text"].encode(errors="surrogateescape"))
        if "drain" in order:
            for source in list(streams):
                while copy(source):
                    pass
            log.wait(order["drain"])
            control.send(json.dumps({"lost": log.lost}).encode())

    while streams:
        ready = {descriptor for descriptor, _ in poll.poll()}
        for source in list(streams):
            if source in ready:
                copy(source)
        if control.fileno() in ready:
            try:
                packet = control.recv(1 << 18)
                if packet:
                    obey(json.loads(packet))
                else:
                    poll.unregister(control)
            except BlockingIOError:
                pass
            except OSError:  # the rank is gone
                poll.unregister(control)
    for console in consoles:
        os.close(console)  # a launcher that waits for the end of its output does not wait for the log's disk
    log.wait(30.0)


if __name__ == "__main__":
    pairs = [int(argument) for argument in sys.argv[2:]]
    relay(socket.socket(fileno=int(sys.argv[1])), dict(zip(pairs[::2], pairs[1::2], strict=True)))
    os._exit(0)  # a thread that waits for a disk must not keep the process
