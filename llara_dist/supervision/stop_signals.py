"""Requests to stop: SIGTERM, SIGUSR1 and Ctrl-C set a flag that the loop looks at when a step is done."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Pre-emption, the end of an allocation and launchers send the first, `sbatch --signal=USR1@120` the second, a terminal
the third."""
ONE_INTERRUPT_S = 2.0
"""A terminal's SIGINT reaches ranks and launcher, which forwards it: within so many seconds it is the same Ctrl-C."""


class StopSignals:
    """While entered, the stop signals end nothing: the first of them is remembered, those that follow change nothing.

    Schedulers and launchers both forward signals, so the same one may come several times. A second Ctrl-C is
    KeyboardInterrupt. Only the main thread may enter it; signal handlers are set nowhere else.

    Attributes:
        requested: the name of the signal that asked to stop, None while none did.

    Args:
        speaks: whether this process answers Ctrl-C with a line on stderr.
    """

    def __init__(self, speaks: bool = False) -> None:
        self.requested: str | None = None
        self._speaks = speaks
        self._interrupted_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # None: whoever set it was not Python; there is no way to put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def ignore(self) -> None:
        """The process is about to exit with a code of its own: from now on, left or not, the signals do nothing."""
        ignore_stop_signals()
        self._before.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is None:
                self._interrupted_at = now
                if self._speaks:  # not through sys.stderr, which may be in the middle of a line's writing
                    os.write(2, b"stopping: saves first; Ctrl-C again ends at once\n")
            elif now - self._interrupted_at > ONE_INTERRUPT_S:
                raise KeyboardInterrupt
        if self.requested is None:
            self.requested = signal.Signals(number).name


def ignore_stop_signals() -> None:
    """From now on the stop signals do nothing in this process.

    For a process that is about to exit with its own code, which a repeated signal would replace, and for helper
    processes that a launcher signals with their parent: the parent decides when they end.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
