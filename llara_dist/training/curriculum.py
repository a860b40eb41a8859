"""The curriculum: which samples of a step are hybrid, the same on every rank, worker and restart.

LLaRA (section 3.4) draws each sample hybrid with probability p(τ), τ the optimizer step. A counter that lives in a
data loader's worker restarts with it and differs between ranks; here both p and the draw are pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llara_dist.config import CurriculumConfig
from llara_dist.hashing import text_seed, uniform

Schedule = Callable[[float], float]
"""Share of the run that is done, in [0, 1) → probability that a sample is hybrid."""


def make_schedule(config: CurriculumConfig) -> Schedule:
    """The schedule by its name; see `CurriculumConfig` for the formulas."""
    schedules: dict[str, Schedule] = {
        "linear": lambda done: done,
        "two_stage": lambda done: 0.0 if done < config.switch else 1.0,
        "constant": lambda done: config.probability,
        "cosine": lambda done: 0.5 * (1.0 - math.cos(math.pi * done)),
        "sqrt": math.sqrt,
    }
    return schedules[config.schedule]


@dataclass(frozen=True)
class Curriculum:
    """p(τ) and the draws.

    Attributes:
        schedule: done share → probability.
        horizon: T, optimizer steps of the whole run.
        seed: the run's seed.
    """

    schedule: Schedule
    horizon: int
    seed: int

    def probability(self, step: int) -> float:
        """p at optimizer step τ = `step`, 0-based: p(0) is the schedule's start."""
        return self.schedule(step / self.horizon)

    def draw(self, step: int, keys: np.ndarray) -> np.ndarray:
        """Whether each sample of a step is hybrid: u(seed, step, key) < p(step).

        Args:
            step: optimizer step.
            keys: uint64 [n].

        Returns:
            bool [n].
        """
        return uniform(text_seed("curriculum"), self.seed, step, keys) < self.probability(step)
