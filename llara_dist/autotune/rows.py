"""The micro-batches that are measured: a run's own, as its first rank computes them, on the device.

Rows are packed as training packs them, every sample hybrid, which is its longer form.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from llara_dist.model.hybrid import HybridLlama
from llara_dist.stream.batch import Batch, collate
from llara_dist.stream.loader import StepMaker
from llara_dist.training.preflight.examine import Inputs

LOOKED_AT = 4096
"""samples of the plan's beginning among which the longest is looked for"""


class Rows:
    """Micro-batches of a run.

    Args:
        inputs: what `open_inputs` made of the run.
        device: where they are put.
        ranks: that share the run's steps.
    """

    def __init__(self, inputs: Inputs, device: torch.device, ranks: int) -> None:
        self._inputs, self._device, self._ranks = inputs, device, ranks
        self._of_step: dict[int, list[Batch]] = {}

    @property
    def most_samples(self) -> int:
        """A rank's share of a step."""
        return math.ceil(self._inputs.plan.global_batch / self._ranks)

    def of_step(self, tokens: int) -> list[Batch]:
        """What the first rank computes in the run's first step.

        Args:
            tokens: budget of a row.
        """
        if tokens not in self._of_step:
            shards, plan = self._inputs.shards, self._inputs.plan
            rows = StepMaker(shards, plan, _all_hybrid, 0, (self._ranks,), tokens).make(0).microbatches
            self._of_step[tokens] = [row.to(self._device, non_blocking=False) for row in rows if not row.is_empty]
        return self._of_step[tokens]

    def largest(self, tokens: int) -> Batch:
        """The longest samples of the plan's beginning that a budget holds.

        Args:
            tokens: the budget.
        """
        plan, shards = self._inputs.plan, self._inputs.shards
        steps = range(min(plan.num_steps, math.ceil(LOOKED_AT / plan.global_batch)))
        ids = np.concatenate([plan.step(step) for step in steps])
        lengths = shards.lookup(ids).tokens.astype(np.int64)
        order = np.argsort(-lengths, kind="stable")
        fitting = max(1, int(np.searchsorted(np.cumsum(lengths[order]), tokens, side="right")))
        chosen = ids[order[: min(fitting, self.most_samples)]]
        return self._collated(chosen, np.ones(len(chosen), dtype=bool))

    def short(self) -> Batch:
        """A few samples, every second one text-only."""
        ids = self._inputs.plan.step(0)[:4]
        return self._collated(ids, np.arange(len(ids)) % 2 == 0)

    def _collated(self, ids: np.ndarray, hybrid: np.ndarray) -> Batch:
        return collate(self._inputs.shards.read(ids), hybrid).to(self._device, non_blocking=False)


def backward(model: HybridLlama, row: Batch) -> Tensor:
    """Mean answer loss of a row, detached; gradients are added to those there are."""
    loss = model(row) / row.answer_tokens
    loss.backward()
    return loss.detach()


def _all_hybrid(step: int, keys: np.ndarray, passes: np.ndarray) -> np.ndarray:
    return np.ones(len(keys), dtype=bool)
