"""OUT/ranks/early-….json: a rank that ends before the run has begun says so to the job's batch step.

The other ranks wait to be joined by it, and do not watch each other yet: without a word nobody would know for half an
hour, nor whose fault it is. Written under a scheduler only, where there is somebody who reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llara_dist.distributed import Job, World
from llara_dist.errors import EXIT_BAD_INPUT, InputError
from llara_dist.supervision.heartbeat import replace_text
from llara_dist.supervision.rank_status import RANKS

_LONGEST_MESSAGE = 2000


@dataclass(frozen=True)
class EarlyEnd:
    """How one rank ended.

    Attributes:
        rank: which.
        world_size: number of ranks.
        host: its host's name.
        code: its exit code.
        everywhere: whether another rank may find the same, or be the reason; false where it is this one's alone.
        message: one line.
    """

    rank: int
    world_size: int
    host: str
    code: int
    everywhere: bool
    message: str


def early_prefix(out: Path, job: Job) -> str:
    """What the names of these files begin with for one start of a job; rank and ".json" follow."""
    name = re.sub(r"[^\w.@]", "_", job.name)
    return str(Path(out) / RANKS / f"early-{name}-{job.restart}-")


def early_paths(out: Path, job: Job) -> set[Path]:
    """The files of one start of a job."""
    prefix = Path(early_prefix(out, job))
    return set(prefix.parent.glob(f"{prefix.name}*.json"))


def read_early_ends(paths: Iterable[Path]) -> list[EarlyEnd]:
    """What ranks said, in their order; files that cannot be read are left out."""
    ends = []
    for path in paths:
        try:
            ends.append(EarlyEnd(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(ends, key=lambda end: end.rank)


@contextlib.contextmanager
def early_end_told(out: Path, world: World, job: Job, joining: bool = False) -> Iterator[None]:
    """While entered, an error that ends this rank is written down for the batch step; it goes on as it is.

    Args:
        out: the run's folder; made if missing.
        world: where this process stands; alone it keeps nobody waiting.
        job: of this process; without a name nothing is written.
        joining: the group is being joined; that fails on ranks that are in order when another one does not come.
    """
    try:
        yield
    except Exception as error:
        if world.size > 1 and job.name:
            with contextlib.suppress(OSError):  # must not hide why the rank ended
                _write(early_prefix(out, job), _end_of(world, error, joining))
        raise


def _end_of(world: World, error: Exception, joining: bool) -> EarlyEnd:
    if isinstance(error, InputError):
        text, everywhere = str(error), error.everywhere
    else:
        text, everywhere = f"{type(error).__name__}: {error}", joining
    # As `llara-dist` exits: a file system's error is bad input.
    code = EXIT_BAD_INPUT if isinstance(error, InputError | OSError) else 1
    message = " ".join(text.split())[:_LONGEST_MESSAGE]
    return EarlyEnd(world.rank, world.size, socket.gethostname(), code, everywhere, message)


def _write(prefix: str, end: EarlyEnd) -> None:
    path = Path(f"{prefix}{end.rank:05d}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(end)) + "\n"
    replace_text(path, text, path.with_name(f".{path.name}.{os.getpid()}.staging"))
