"""One curve: every ZeRO stage and every number of ranks trains the same model (invariants 1, 3, 4, 5)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llara_dist.training.metrics_log import read_metrics
from tests.distributed.ranks import run_ranks
from tests.distributed.training import train_all
from tests.runs import run_config

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
STEPS = 60


@pytest.fixture(scope="module")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NF4 + LoRA + projector at dropout 0, 60 steps over an epoch's end, every ds_config on one and on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    for size in (1, 2):
        configs = [run_config(inputs, folder / f"{stage}-{size}", stage, max_steps=STEPS) for stage in STAGES]
        run_ranks(train_all, size, folder / f"ranks-{size}", configs)
    return folder


def curve(run: Path) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in read_metrics(run / "metrics.jsonl")], dtype=torch.float64)


def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / f"step-{STEPS:08d}"


CASES = [(stage, size) for size in (1, 2) for stage in STAGES if (stage, size) != ("zero0", 1)]


@pytest.mark.parametrize(("stage", "size"), CASES)
def test_same_losses(runs: Path, stage: str, size: int) -> None:
    expected, found = curve(runs / "zero0-1"), curve(runs / f"{stage}-{size}")
    assert len(expected) == STEPS
    worst = ((found - expected) / expected).abs().max().item()
    assert worst < 1e-5, f"losses differ by {worst:.2e} relative"
    assert expected[-10:].mean() < expected[:10].mean() - 0.1  # it learns


@pytest.mark.parametrize(("stage", "size"), CASES)
def test_same_parameters_and_moments(runs: Path, stage: str, size: int) -> None:
    expected = load_file(checkpoint(runs / "zero0-1") / "optimizer.safetensors")
    found = load_file(checkpoint(runs / f"{stage}-{size}") / "optimizer.safetensors")
    assert expected.keys() == found.keys()
    assert sum(name.startswith("master/") for name in expected) == 28 + 4
    for name, value in expected.items():
        # Adam divides by the root of tiny second moments, which magnifies rounding in single elements.
        difference = (found[name] - value).norm() / value.norm().clamp_min(1e-12)
        assert difference < 1e-4, f"{name}: {difference:.2e}"


def test_the_run_was_uneven_and_crossed_an_epoch(runs: Path) -> None:
    rows = read_metrics(runs / "zero0-2" / "metrics.jsonl")
    assert {row["epoch"] for row in rows} >= {0, 1}
    assert len({row["microbatches"] for row in rows}) > 1
    assert len({row["samples"] for row in rows}) > 1  # an epoch's last step is smaller
    assert 0 < sum(row["hybrid_share"] for row in rows) < len(rows)
    assert rows[0]["p"] == 0.0
    assert rows[0]["hybrid_share"] == 0.0


def test_masters_are_float32_and_the_projector_is_saved(runs: Path) -> None:
    for stage in STAGES:
        stored = load_file(checkpoint(runs / f"{stage}-2") / "projector.safetensors")
        assert {tuple(value.shape) for value in stored.values()} == {(64, 16), (64,), (64, 64)}
        assert {value.dtype for value in stored.values()} == {torch.float32}
    state = json.loads((checkpoint(runs / "zero3-2") / "state.json").read_text())
    assert state["step"] == STEPS
    assert state["world_size"] == 2
