"""Checks that do not hide each other's findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from llara_dist.errors import Finding, FindingsError, InputError, findings_of

T = TypeVar("T")


class Checklist:
    """Runs checks one after the other and keeps what each found.

    Attributes:
        findings: one or more a check, in the order in which they ran: errors, warnings, and what passed or was skipped.
    """

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def run(
        self,
        name: str,
        check: Callable[..., T],
        *needs: object,
        after: Sequence[object] = (),
        passed: Callable[[T], str] | None = None,
    ) -> T | None:
        """Run a check on what it needs.

        Args:
            name: of the check.
            check: called with `needs`; an InputError or OSError is its finding.
            needs: None stands for what an earlier check could not give: then this one is skipped.
            after: results without which the check would only repeat an earlier one's error; None as in `needs`.
            passed: what to say of its result; by default nothing is said.

        Returns:
            The check's result, None where it failed or was skipped.
        """
        if any(need is None for need in (*needs, *after)):
            self.findings.append(Finding(name, "not checked: what it needs has an error itself", severity="skipped"))
            return None
        try:
            result = check(*needs)
            if passed is not None:
                self.note(name, passed(result))
        except InputError as error:
            self.findings.extend(findings_of(name, error))
            return None
        except OSError as error:
            self.findings.append(Finding(name, f"{error.filename or name}: {error.strerror or error}"))
            return None
        return result

    def note(self, name: str, found: str) -> None:
        """Say what a check found that passed."""
        self.findings.append(Finding(name, found, severity="passed"))

    def extend(self, findings: Iterable[Finding]) -> bool:
        """Take over what a check found; returns whether there is no error among it."""
        found = list(findings)
        self.findings.extend(found)
        return all(finding.severity != "error" for finding in found)

    def of(self, severity: str) -> list[Finding]:
        """The findings of one severity."""
        return [finding for finding in self.findings if finding.severity == severity]

    def raise_errors(self, local_rank: int, shown: bool = False) -> None:
        """End the command if any check failed.

        Args:
            local_rank: 0 says everything, another rank only what concerns itself, if anything does.
            shown: whether the findings were printed already.

        Raises:
            FindingsError: with the errors and, for --json, the warnings.
        """
        errors = self.of("error")
        if not errors:
            return
        own = [finding for finding in errors if not finding.everywhere]
        said = errors if local_rank == 0 or not own else own
        raise FindingsError([*said, *self.of("warning")], "preflight", shown)
