"""`llara-dist top`: a run on the terminal, again and again."""

from __future__ import annotations

import contextlib
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llara_dist.errors import InputError
from llara_dist.watching.look import View, Watch
from llara_dist.watching.screen import draw


def top(run: Path, once: bool = False, every: float = 2.0, all: bool = False) -> dict[str, Any]:
    """Show a run: how far it is, how fast, and each of its ranks, those that stand out first. q or Ctrl-C ends it.

    Only the run's folder is read. Whether a rank lives is seen by watching its heartbeat move, so that `--once` takes
    as long as one heartbeat (faults.heartbeat_s), three where a rank is silent.

    Args:
        run: the run's folder.
        once: print it once and end; needs no terminal.
        every: seconds between two looks.
        all: show every rank of a run of more than 40.

    Returns:
        What was seen last.

    Raises:
        InputError: there is no such folder, or no terminal to draw on.
    """
    if every <= 0:
        raise InputError(f"--every={every}: must be positive")
    watch = Watch(run)
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if once:
        view = watch.look_until_settled()
    elif not console.is_terminal:
        raise InputError("stdout is no terminal, to which this could be drawn again and again; add --once")
    else:
        view = _live(watch, console, every, all)
    console.print(draw(view, console.width, all))
    return view.to_json()


def _live(watch: Watch, console: Any, every: float, every_rank: bool) -> View:
    """Draw until somebody ends it; returns what was seen last."""
    from rich.live import Live

    view = watch.look()
    with (
        contextlib.suppress(KeyboardInterrupt),
        _keys() as keys,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            live.update(draw(view, console.width, every_rank), refresh=True)
            if _quit_pressed(keys, every):
                break
            view = watch.look()
    return view


@contextlib.contextmanager
def _keys() -> Iterator[int | None]:
    """Standard input's descriptor, each key at once and unseen; None where it is no terminal."""
    import termios
    import tty

    if not sys.stdin.isatty():
        yield None
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _quit_pressed(keys: int | None, seconds: float) -> bool:
    """Wait; whether q was pressed meanwhile."""
    if keys is None:
        time.sleep(seconds)
        return False
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if select.select([keys], [], [], left)[0] and sys.stdin.read(1) in ("q", "Q", ""):
            return True
    return False
