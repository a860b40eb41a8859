"""What ends a command early: what a user can mend (exit code 2), a request to stop (75), a lost rank (70)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

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


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name, two or three words.
        found: the problem, naming file and field; or what is right.
        remedy: what to do about it.
        severity: error = the run cannot start; skipped = not checked, because of an error elsewhere.
        everywhere: whether every rank of the node finds the same; false where it concerns this rank alone.
    """

    check: str
    found: str
    remedy: str = ""
    severity: Literal["error", "warning", "passed", "skipped"] = "error"
    everywhere: bool = True

    @property
    def line(self) -> str:
        """Problem and remedy in one line."""
        return f"{self.found}; {self.remedy}" if self.remedy else self.found


class FindingsError(InputError):
    """Several things that the user can correct, found at once; of a single one it is that one's line.

    Args:
        findings: at least one of severity error; `errors` are those that are.
        where: what the line begins with when there are several.
        shown: whether the findings were printed already.
        result: what --json prints; by default the findings.
    """

    def __init__(
        self, findings: Sequence[Finding], where: str, shown: bool = False, result: dict[str, Any] | None = None
    ) -> None:
        self.findings = tuple(findings)
        self.errors = tuple(finding for finding in findings if finding.severity == "error")
        self.shown = shown
        several = f"{where}: {len(self.errors)} findings; nothing was read or written"
        super().__init__(
            self.errors[0].line if len(self.errors) == 1 else several,
            everywhere=all(finding.everywhere for finding in self.errors),
            result=result or {"findings": [asdict(finding) for finding in findings]},
        )


def findings_of(check: str, error: InputError) -> tuple[Finding, ...]:
    """What an error found; the part of its line after the last semicolon says what to do."""
    if isinstance(error, FindingsError):
        return error.findings
    found, separator, remedy = str(error).rpartition("; ")
    return (Finding(check, found if separator else remedy, remedy if separator else "", everywhere=error.everywhere),)


class RequeueError(RuntimeError):
    """The run was told to stop, has written its checkpoint, and goes on when started again: exit code 75."""


class RankLostError(RuntimeError):
    """Another rank died or hung; the message says which, at what step and phase: exit code 70."""


class RunFailedError(RuntimeError):
    """The run ended where no restart would help by itself, on every rank: one line and exit code 1."""
