"""Signs of life: a thread that beats, and small files on a shared file system that others read."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

_MISSED_BEATS = 3
_SHORTEST_SILENCE_S = 3.0
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def silence_s(interval_s: float) -> float:
    """For how long a process must give no sign of life to count as silent: three beats.

    At least three seconds, which a thread may have to wait on a busy machine.

    Args:
        interval_s: seconds between its signs of life.
    """
    return max(_MISSED_BEATS * interval_s, _SHORTEST_SILENCE_S)


class Heartbeat:
    """Calls a function every `interval_s` in a daemon thread, until stopped.

    Args:
        beat: must not raise.
        interval_s: seconds from the end of one call to the next.
        delay_s: seconds before the first call.
        name: of the thread, as stacks show it.
    """

    def __init__(self, beat: Callable[[], None], interval_s: float, delay_s: float = 0.0, name: str = "beat") -> None:
        self._beat, self._interval_s, self._delay_s = beat, interval_s, delay_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        wait = self._delay_s
        while not self._stop.wait(wait):
            self._beat()
            wait = self._interval_s

    def stop(self) -> None:
        """End the thread; returns when a call that is under way has ended."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()


def replace_text(path: Path, text: str, staging: Path) -> None:
    """Put a whole text under a name, at once; readers see the old one or the new one.

    Nothing is synced: a sign of life need not outlive the power, and a sync would wait behind a checkpoint's writes.

    Args:
        path: the final name.
        text: what it will hold.
        staging: a name beside it that nobody else writes.
    """
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)


def create_exclusively(path: Path, text: str, staging: Path) -> bool:
    """Put a whole text under a name that does not exist yet; of any number of racers exactly one succeeds.

    A hard link is atomic on NFS as well. A server's answer may get lost and the repeated request find the link that
    the first one made: then the staging file has two names, and this process has won all the same.

    Args:
        path: the final name.
        text: what it will hold.
        staging: a name beside it that nobody else writes.

    Returns:
        Whether this process created it.
    """
    staging.write_text(text, encoding="utf-8")
    try:
        os.link(staging, path)
    except FileExistsError:
        return staging.stat().st_nlink > 1
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # A file system of an object store: exclusive, though a reader may for an instant see an empty file.
        with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
            file.write(text)
            return True
        return False
    finally:
        staging.unlink(missing_ok=True)
    return True
