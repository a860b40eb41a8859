"""The one error type for what a user can mend; the command line turns it into one line and exit code 2."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: a file, a field, a flag or a combination of them that the user can correct.

    The message is one line that names the file, the field (shard, row, offset) and what to do about it.

    Args:
        message: that line.
        everywhere: whether every rank finds the same, so that one of them says it; false where one rank alone did.
    """

    def __init__(self, message: str, everywhere: bool = True) -> None:
        super().__init__(message)
        self.everywhere = everywhere
