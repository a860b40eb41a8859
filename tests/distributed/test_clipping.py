"""The gradients' norm, and clipping by it, are the same under every ZeRO stage, whoever computes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from llara_dist.training.metrics_log import read_metrics
from tests.distributed.ranks import run_ranks
from tests.distributed.training import train_all
from tests.runs import run_config

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")


@pytest.mark.long
def test_every_stage_clips_alike(inputs: Path, tmp_path: Path) -> None:
    """By a limit far below the norms: each loss after the first step depends on how the last was clipped."""
    configs = []
    for name, stage, limit in [*((stage, stage, 0.02) for stage in STAGES), ("unclipped", "zero0", 0.0)]:
        config = run_config(inputs, tmp_path / name, stage, max_steps=4)
        # A large epsilon: else AdamW's first steps do not depend on the gradients' scale.
        optimizer = dataclasses.replace(config.optimizer, max_grad_norm=limit, epsilon=1e-2, warmup_fraction=0.0)
        configs.append(dataclasses.replace(config, optimizer=optimizer))
    run_ranks(train_all, 2, tmp_path / "ranks", configs)
    rows = {config.out.name: read_metrics(config.out / "metrics.jsonl") for config in configs}
    norms = {name: [row["grad_norm"] for row in found] for name, found in rows.items()}
    losses = {name: [row["loss"] for row in found] for name, found in rows.items()}
    assert min(norms["zero0"]) > 0.1
    for stage in STAGES:
        assert norms[stage] == pytest.approx(norms["zero0"], rel=1e-5), stage
        assert losses[stage] == pytest.approx(losses["zero0"], rel=1e-6), stage
    assert abs(losses["unclipped"][-1] / losses["zero0"][-1] - 1) > 1e-4
