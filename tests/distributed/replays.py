"""What ranks run in the tests of replays; importable by name."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from llara_dist.config import RunConfig
from llara_dist.stream.batch import Batch
from llara_dist.training import engine
from llara_dist.tuning import train


def train_and_keep_batches(config: RunConfig, kept: Path) -> None:
    """`llara-dist train`; each rank keeps the tensors of its micro-batches, and the loss that each one gave."""
    kept.mkdir(parents=True, exist_ok=True)
    train_step = engine.Engine.train_step

    def keep(self: engine.Engine, step, *rates, **votes):
        losses: list[float] = []
        forward = self.model.forward

        def compute(batch: Batch) -> torch.Tensor:
            loss = forward(batch)
            losses.append(float(loss.detach()))
            return loss

        self.model.forward = compute  # pyright: ignore[reportAttributeAccessIssue]
        result = train_step(self, step, *rates, **votes)
        del self.model.forward
        name = f"step-{step.index}-rank-{self.world.rank}"
        for turn, batch in enumerate(step.microbatches):
            tensors = {name: value.clone() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
            save_file(tensors, kept / f"{name}-{turn}.safetensors")
        (kept / f"{name}.json").write_text(json.dumps(losses))
        return result

    engine.Engine.train_step = keep
    try:
        train(config)
    finally:
        engine.Engine.train_step = train_step
