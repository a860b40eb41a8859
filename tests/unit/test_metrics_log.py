"""What a run's log does beside writing: it is cut back at a restart, and outlives the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llara_dist.training.metrics_log import MetricsLog, read_metrics
from llara_dist.training.scores import ValidationScores

ROW = {
    "loss": 1.0,
    "p": 0.5,
    "hybrid_share": 0.5,
    "lora_lr": 1e-3,
    "samples_per_s": 1.0,
    "tokens_per_s": 9.0,
    "padding_share": 0.0,
    "memory_mib": 1.0,
}


def scores(step: int) -> ValidationScores:
    return ValidationScores(step, 0.5, 1.0, None, 7, 0.1)


def test_a_restart_drops_what_it_does_again_and_keeps_what_it_does_not(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0, 9, enabled=True) as log:
        for step in range(6):
            log.write({"step": step, **ROW})
        for step in (2, 4, 6):
            log.write_validation(scores(step), is_best=False)
    with MetricsLog(tmp_path, 4, 9, enabled=True, validated=4):
        pass
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert [row["step"] for row in read_metrics(tmp_path / "validation.jsonl")] == [2, 4]
    with MetricsLog(tmp_path, 4, 9, enabled=True, validated=3):  # that of step 4 is owed
        pass
    assert [row["step"] for row in read_metrics(tmp_path / "validation.jsonl")] == [2]


def test_a_step_without_a_finite_loss_is_null_in_the_log(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0, 1, enabled=True) as log:
        log.write({"step": 0, **ROW, "loss": None})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_a_full_disk_costs_the_log_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with MetricsLog(tmp_path, 0, 2, enabled=True) as log:
        (tmp_path / "validation.jsonl").symlink_to(full)
        log.write({"step": 0, **ROW})
        log._file.close()
        log._file = open(full, "a", encoding="utf-8")  # noqa: SIM115
        log.write({"step": 1, **ROW})
        log.write_validation(scores(2), is_best=True)
    said = capsys.readouterr().out
    assert said.count("the log cannot be written (No space left on device); the run goes on without") == 1
    assert "validation after step 2" in said
