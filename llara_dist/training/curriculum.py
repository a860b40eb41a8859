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

SCHEDULES: dict[str, Callable[[float, CurriculumConfig], float]] = {
    "linear": lambda done, config: done,
    "two_stage": lambda done, config: 0.0 if done < config.switch else 1.0,
    "constant": lambda done, config: config.probability,
    "cosine": lambda done, config: 0.5 * (1.0 - math.cos(math.pi * done)),
    "sqrt": lambda done, config: math.sqrt(done),
}
"""By name: (share of the run that is done, in [0, 1); settings) → probability that a sample is hybrid."""


@dataclass(frozen=True)
class Curriculum:
    """p(τ) and the draws; plain values, so that reader processes can hold it.

    Attributes:
        config: which schedule, and its settings.
        horizon: T, optimizer steps of the whole run.
        seed: the run's seed.
    """

    config: CurriculumConfig
    horizon: int
    seed: int

    def probability(self, step: int) -> float:
        """p at optimizer step τ = `step`, 0-based: p(0) is the schedule's start."""
        return SCHEDULES[self.config.schedule](step / self.horizon, self.config)

    def draw(self, step: int, keys: np.ndarray, passes: np.ndarray | None = None) -> np.ndarray:
        """Whether each sample of a step is hybrid: u(seed, step, key) < p(step).

        Args:
            step: optimizer step.
            keys: uint64 [n].
            passes: not used; a step holds a key once.

        Returns:
            bool [n].
        """
        return uniform(text_seed("curriculum"), self.seed, step, keys) < self.probability(step)
