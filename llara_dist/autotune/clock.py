"""A limit of time that holds whatever is being measured when it is reached."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTime(BaseException):
    """The time is up; what runs is broken off. No error, like KeyboardInterrupt: no handler of errors may take it."""


class Clock:
    """Counts from when it is made.

    Args:
        seconds: that there are.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started = time.monotonic()

    def passed(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._started

    def left(self) -> float:
        """Seconds that are left; negative afterwards."""
        return self.seconds - self.passed()

    @contextmanager
    def limit(self) -> Iterator[None]:
        """Break off the block with OutOfTime when the time is up.

        By a timer's signal, which Python delivers to its main thread: in another thread nothing is broken off, and a
        call into a library ends first.
        """
        if self.left() <= 0:
            raise OutOfTime
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(number: int, frame: FrameType | None) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, end)
        started = time.monotonic()
        earlier, interval = signal.setitimer(signal.ITIMER_REAL, self.left())
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            if earlier:  # somebody else's timer goes on
                passed = time.monotonic() - started
                signal.setitimer(signal.ITIMER_REAL, max(earlier - passed, 1e-3), interval)
