"""A last layer that computes only what answers need, under ZeRO-3: the same curve as a whole one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest

from llara_dist.config import KernelsConfig, RunConfig
from llara_dist.training.metrics_log import read_metrics
from tests.distributed.ranks import run_ranks
from tests.distributed.training import train_all
from tests.runs import run_config

STEPS = 6


def config_of(inputs: Path, folder: Path, last_layer: Literal["answers", "all"]) -> RunConfig:
    """Every matrix is partitioned, layers are recomputed, and some of the micro-batches are stand-ins."""
    config = run_config(
        inputs, folder / last_layer, "zero3", max_steps=STEPS, global_batch_samples=3, max_tokens_per_microbatch=230
    )
    ds_config = json.loads(config.deepspeed.read_text())
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / f"{last_layer}.json"
    path.write_text(json.dumps(ds_config))
    model = dataclasses.replace(config.model, activation_checkpointing=True)
    return dataclasses.replace(config, model=model, deepspeed=path, kernels=KernelsConfig(last_layer=last_layer))


@pytest.mark.long
def test_same_curve_under_zero3(inputs: Path, tmp_path: Path) -> None:
    run_ranks(train_all, 2, tmp_path / "ranks", [config_of(inputs, tmp_path, rows) for rows in ("answers", "all")])
    few, whole = (read_metrics(tmp_path / rows / "metrics.jsonl") for rows in ("answers", "all"))
    assert len(few) == len(whole) == STEPS
    assert max(row["microbatches"] for row in few) > 1
    assert [row["loss"] for row in few] == pytest.approx([row["loss"] for row in whole], rel=1e-5)
    assert [row["grad_norm"] for row in few] == pytest.approx([row["grad_norm"] for row in whole], rel=1e-4)
    assert few[-1]["loss"] != few[0]["loss"]
