"""Which checkpoint is the best by validation, and the file beside the checkpoints that names it.

`RUN/checkpoints/best.json` holds a `Score`. It is replaced after the checkpoint that it names is complete and before an
older one is removed, so that it never names a folder that is not there, wherever a kill falls.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from llara_dist.errors import InputError
from llara_dist.integrity import read_json, write_json

BEST = "best.json"


@dataclass(frozen=True)
class Score:
    """What validation gave.

    Attributes:
        step: how many optimizer steps were done.
        hit_ratio: HR@1 over all rows validated, in [0, 1].
        loss: summed answer cross-entropy ÷ answer tokens, in nats; it breaks ties of so few rows.
    """

    step: int
    hit_ratio: float
    loss: float


def is_better(candidate: Score, best: Score | None) -> bool:
    """Whether a score beats the best so far: higher HR@1, then lower loss; the earlier stays where both are equal.

    What is not a number beats nothing but its absence.
    """
    return best is None or _order(candidate) > _order(best)


def _order(score: Score) -> tuple[float, float]:
    return (
        -math.inf if math.isnan(score.hit_ratio) else score.hit_ratio,
        -math.inf if math.isnan(score.loss) else -score.loss,
    )


def write_best(folder: Path, score: Score) -> None:
    """Name the best checkpoint, which is complete already.

    Args:
        folder: the run's `checkpoints` folder.
        score: of the best; its step names the checkpoint.
    """
    write_json(folder / BEST, dataclasses.asdict(score))


def read_best(folder: Path) -> Score | None:
    """The best checkpoint's score; None where nothing was validated, or nothing saved since.

    Args:
        folder: the run's `checkpoints` folder.

    Raises:
        InputError: best.json is damaged.
    """
    path = folder / BEST
    if not path.is_file():
        return None
    values = read_json(path, "the score of the best checkpoint")
    try:
        return Score(int(values["step"]), float(values["hit_ratio"]), float(values["loss"]))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: no step, hit_ratio and loss; remove it, or use --checkpoint last") from None
