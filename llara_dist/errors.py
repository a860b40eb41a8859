"""The one error type for what a user can mend; the command line turns it into one line and exit code 2."""

from __future__ import annotations

from typing import Any


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
