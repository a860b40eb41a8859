"""Which checkpoint is the best by validation, and the file beside the checkpoints that names it.

`RUN/checkpoints/best.json` holds its scores. It is replaced after the checkpoint that it names is complete and before
an older one is removed, so that it never names a folder that is not there, wherever a kill falls.
"""

from __future__ import annotations

from pathlib import Path

from llara_dist.errors import InputError
from llara_dist.integrity import read_json, write_json
from llara_dist.training.scores import ValidationScores

BEST = "best.json"


def write_best(folder: Path, scores: ValidationScores) -> None:
    """Name the best checkpoint, which is complete already.

    Args:
        folder: the run's `checkpoints` folder.
        scores: of the best; their step names the checkpoint.
    """
    write_json(folder / BEST, scores.to_dict())


def read_best(folder: Path) -> ValidationScores | None:
    """The best checkpoint's scores; None where nothing was validated, or nothing saved since.

    Args:
        folder: the run's `checkpoints` folder.

    Raises:
        InputError: best.json is damaged.
    """
    path = folder / BEST
    if not path.is_file():
        return None
    values = read_json(path, "the scores of the best checkpoint")
    try:
        return ValidationScores.from_dict(values)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: no step, hit_ratio and loss; remove it, or use --checkpoint last") from None
