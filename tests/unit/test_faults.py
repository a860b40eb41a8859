"""Skipped steps are counted against a limit, spikes are seen, and both are logged with sample keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara_dist.config import FaultsConfig
from llara_dist.errors import RunFailedError
from llara_dist.stream.loader import Step
from llara_dist.training.engine import StepResult
from llara_dist.training.faults import LEAST, Faults


def step(index: int) -> Step:
    return Step(index, 0, [], [], 3, 0, 9, 30, 0.0, np.array([index, index + 1, index + 2], dtype=np.uint64))


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_the_limit_stops_the_run_and_names_the_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = Faults(FaultsConfig(max_skipped_steps=2), tmp_path, skipped=1)
    faults.after(step(5), StepResult(float("nan"), None, skipped=True, suspects=(7, 8)))
    assert faults.skipped == 2
    faults.after(step(6), StepResult(1.0, 1.0))
    with pytest.raises(RunFailedError, match=r"step 7: a gradient is not finite.*max_skipped_steps=2.*keys: 11, 12\."):
        faults.after(step(7), StepResult(2.0, None, skipped=True, suspects=(11, 12)))
    assert [(event["step"], event["kind"], event["keys"]) for event in events(tmp_path)] == [
        (5, "skipped", [7, 8]),
        (7, "skipped", [11, 12]),
    ]
    assert "step 5: skipped: the loss is not finite" in capsys.readouterr().out


def test_a_spike_is_logged_with_its_sample_keys_and_a_calm_run_logs_nothing(tmp_path: Path) -> None:
    faults = Faults(FaultsConfig(spike_deviations=6.0), tmp_path)
    for index in range(LEAST):
        faults.after(step(index), StepResult(2.0 + 0.01 * (index % 3), 1.0))
    assert not (tmp_path / "events.jsonl").exists()
    faults.after(step(50), StepResult(3.0, 1.0))
    (event,) = events(tmp_path)
    assert (event["kind"], event["step"], event["keys"], event["loss"]) == ("spike", 50, [50, 51, 52], "3.0")


def test_a_high_loss_at_the_start_is_no_spike_and_zero_switches_spikes_off(tmp_path: Path) -> None:
    early = Faults(FaultsConfig(), tmp_path)
    for index in range(LEAST - 1):
        early.after(step(index), StepResult(2.0 + 0.001 * index, 1.0))
    early.after(step(40), StepResult(9.0, 1.0))
    off = Faults(FaultsConfig(spike_deviations=0.0), tmp_path)
    for index in range(LEAST):
        off.after(step(index), StepResult(2.0 + 0.001 * index, 1.0))
    off.after(step(40), StepResult(9.0, 1.0))
    assert not (tmp_path / "events.jsonl").exists()


def test_other_ranks_count_but_write_nothing(tmp_path: Path) -> None:
    faults = Faults(FaultsConfig(), tmp_path, enabled=False)
    faults.after(step(0), StepResult(float("inf"), None, skipped=True))
    assert faults.skipped == 1
    assert not (tmp_path / "events.jsonl").exists()
