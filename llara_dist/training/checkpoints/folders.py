"""Which checkpoints a run has, by names and markers alone; needs no torch, for whoever only looks."""

from __future__ import annotations

import re
from pathlib import Path

STATE = "state.json"
MARKER = "complete.json"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after so many optimizer steps lies; names sort by step.

    Args:
        folder: the run's `checkpoints` folder.
        step: optimizer steps done.
    """
    return folder / f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    """How many optimizer steps a checkpoint's name says."""
    return int(path.name.removeprefix("step-"))


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints of a run, complete or not, by step; what a person put beside them under another name is not one.

    Args:
        folder: the run's `checkpoints` folder.
    """
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def newest_step(folder: Path) -> int | None:
    """The step of the newest complete checkpoint by its marker alone, None where there is none."""
    complete = [path for path in checkpoint_folders(folder) if (path / MARKER).is_file()]
    return checkpoint_step(complete[-1]) if complete else None
