"""What a person sees: tables and lines on stdout, progress bars on a terminal's stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

GIB = 2**30
"""bytes; the unit in which sizes are set and shown"""


def say(text: str) -> None:
    """Print one line for a person on stdout, at once."""
    print(text, flush=True)


def warn(text: str) -> None:
    """Print one line on stderr that a person should read before trusting what follows."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def table(title: str, columns: list[str], rows: Iterable[Iterable[object]], stderr: bool = False) -> None:
    """Print a table on stdout or stderr; numbers right-aligned is the caller's formatting."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*[str(cell) for cell in row])
    Console(stderr=stderr, markup=False, highlight=False).print(drawn)


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar on stderr when that is a terminal, silently otherwise."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=description, total=total, console=Console(stderr=True), transient=True)
