"""Why a job was requeued, and when that has led nowhere: OUT/requeues.jsonl."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llara_dist.integrity import append_json_line, read_json_lines
from llara_dist.training.checkpoints.folders import checkpoint_folders, checkpoint_step

REQUEUES = "requeues.jsonl"
IDLE_REQUEUES = 3
"""So many requeues in a row without a new checkpoint, and the next such end is the last."""


@dataclass(frozen=True)
class Requeue:
    """One requeue that the job asked for itself.

    Attributes:
        job: scheduler's job, "1234@cluster".
        restart: of which it was the end.
        step: of the newest checkpoint; 0 = none.
        why: it was told to stop; it lost a rank.
        blamed: nodes of the ranks that were lost.
        excluded: those of them that the job must not have again.
        time: local time with zone, for people.
    """

    job: str
    restart: int
    step: int
    why: Literal["stopped", "lost"]
    blamed: tuple[str, ...]
    excluded: tuple[str, ...]
    time: str


def read_requeues(out: Path) -> list[Requeue]:
    """All of a run's, oldest first; lines that a kill or a full disk tore are left out."""
    requeues = []
    for values in read_json_lines(out / REQUEUES):
        with contextlib.suppress(TypeError, KeyError):
            nodes = {"blamed": tuple(values["blamed"]), "excluded": tuple(values["excluded"])}
            requeues.append(Requeue(**{**values, **nodes}))
    return requeues


def record_requeue(out: Path, requeue: Requeue) -> None:
    """Append one, durably."""
    out.mkdir(parents=True, exist_ok=True)
    append_json_line(out / REQUEUES, dataclasses.asdict(requeue))


def idle_requeues(requeues: Sequence[Requeue], step: int) -> int:
    """How many of a job's last requeues in a row found the same newest checkpoint as there is now.

    Args:
        requeues: of the job, oldest first.
        step: of the newest checkpoint now.
    """
    return sum(1 for _ in itertools.takewhile(lambda requeue: requeue.step == step, reversed(requeues)))


def newest_step(out: Path) -> int:
    """The step of a run's newest checkpoint by its name alone, which no half-written one has; 0 = there is none."""
    folders = checkpoint_folders(out / "checkpoints")
    return checkpoint_step(folders[-1]) if folders else 0
