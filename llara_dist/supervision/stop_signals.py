"""Requests to stop: SIGTERM and SIGUSR1 set a flag that the loop looks at when a step is done."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Pre-emption, the end of an allocation and launchers send the first, `sbatch --signal=USR1@120` the second."""


class StopSignals:
    """While entered, SIGTERM and SIGUSR1 end nothing: the first of them is remembered, all that follow change nothing.

    Schedulers and launchers both forward signals, so the same one may come several times. Ctrl-C stays
    KeyboardInterrupt. Only the main thread may enter it; signal handlers are set nowhere else.

    Attributes:
        requested: the name of the signal that asked to stop, None while none did.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
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
        if self.requested is None:
            self.requested = signal.Signals(number).name


def ignore_stop_signals() -> None:
    """From now on SIGTERM and SIGUSR1 do nothing in this process.

    For a process that is about to exit with its own code, which a repeated signal would replace, and for helper
    processes that a launcher signals with their parent: the parent decides when they end.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
