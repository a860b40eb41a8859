"""The three things that a check can say."""

from __future__ import annotations

from llara_dist.errors import Finding


def passed(check: str, found: str) -> Finding:
    """It is right; says what is there."""
    return Finding(check, found, severity="passed")


def skipped(check: str, found: str) -> Finding:
    """It was not looked at; says why."""
    return Finding(check, found, severity="skipped")


def warning(check: str, found: str, remedy: str) -> Finding:
    """A run works, but slower or less surely."""
    return Finding(check, found, remedy, "warning")


def error(check: str, found: str, remedy: str) -> Finding:
    """A run would fail."""
    return Finding(check, found, remedy, "error")
