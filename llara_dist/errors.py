"""What ends a command early: what a user can mend (exit code 2), a request to stop (75), a lost rank (70)."""

from __future__ import annotations

from typing import Any

EXIT_BAD_INPUT = 2
"""what the user can correct"""
EXIT_RANK_LOST = 70
"""another rank died or hung (sysexits.h: EX_SOFTWARE)"""
EXIT_REQUEUE = 75
"""stopped on request with a checkpoint written: start again and it goes on (sysexits.h: EX_TEMPFAIL)"""


class InputError(ValueError):
    """Bad input: a file, a field, a flag or a combination of them that the user can correct.

    The message is one line that names the file, the field (shard, row, offset) and what to do about it.

    Args:
        message: that line.
        everywhere: whether every rank finds the same, so that one of them says it; false where one rank alone did.
        result: what a command found out all the same; --json prints it.
    """

    def __init__(self, message: str, everywhere: bool = True, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.everywhere = everywhere
        self.result = result


class RequeueError(RuntimeError):
    """The run was told to stop, has written its checkpoint, and goes on when started again: exit code 75."""


class RankLostError(RuntimeError):
    """Another rank died or hung; the message says which, at what step and phase: exit code 70."""


class RunFailedError(RuntimeError):
    """The run ended where no restart would help by itself, on every rank: one line and exit code 1."""
