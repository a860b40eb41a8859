"""What a run's log does beside writing: it is cut back at a restart, and outlives the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llara_dist.errors import RankLostError
from llara_dist.training.between_steps import StoppedError
from llara_dist.training.metrics_log import MetricsLog, read_metrics
from llara_dist.training.pace import Pace, compact, duration, progress_line
from llara_dist.training.scores import ValidationScores
from llara_dist.training.trackers import Ending

ROW = {
    "loss": 1.0,
    "p": 0.5,
    "hybrid_share": 0.5,
    "lora_lr": 1e-3,
    "memory_mib": 2048.0,
    "samples": 3,
    "tokens": 100,
    "mfu": None,
    "data_wait_s": 0.1,
    "step_s": 0.9,
    "saving_s": 1.0,
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


def test_a_log_gets_a_line_now_and_then_and_always_the_first_and_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MetricsLog(tmp_path, 0, 900, enabled=True) as log:
        for step in range(600):  # stopped before its end
            log.write({"step": step, **ROW})
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "step 1/900  loss 1.0000  p 0.500  100 tokens/s  data wait 10.0%  2,048 MiB  ETA 0:29:58"
    assert last.startswith("step 600/900  loss 1.0000  ")
    with MetricsLog(tmp_path, 600, 900, enabled=True) as log:
        log.write({"step": 899, **ROW})
    assert capsys.readouterr().out.startswith("step 900/900  ")


def test_a_line_for_a_terminal_fits_80_columns_with_its_count() -> None:
    row = {"step": 12345, **ROW, "loss": 12.3456, "mfu": 0.5, "memory_mib": 70_000.0}
    pace = Pace.of([row | {"tokens": 123_456}] * 2)
    assert pace == Pace(3.0, 123_456.0, 0.1, 0.5, 2.0)
    text = progress_line(row, pace, 20_000, short=True)
    assert text == "loss 12.3456 p 0.500 123.5k tok/s wait 10.0% MFU 50% ETA 4:15:08 68.4G"
    assert len("12346/20000 " + text.removesuffix(" 68.4G")) < 80
    assert "not finite" in progress_line({**row, "loss": None}, pace, 20_000)


def test_numbers_for_people() -> None:
    assert [compact(number) for number in (7.4, 999, 1000, 24_130, 2.5e6)] == ["7", "999", "1.0k", "24.1k", "2.5M"]
    assert [duration(seconds) for seconds in (0, 61.6, 93_839, 400_000)] == ["0:00:00", "0:01:02", "26:03:59", "4d 15h"]


def test_rows_go_to_the_trackers_which_learn_what_earlier_starts_logged(tmp_path: Path) -> None:
    calls: list[object] = []

    class Recorder:
        def log(self, kind: str, step: int, numbers: dict[str, float]) -> None:
            calls.append((kind, step, sorted(numbers)[:1]))

        def close(self, ending: Ending) -> None:
            calls.append(ending)

    def open_trackers(logged: dict[str, list[dict[str, int]]]) -> list[Recorder]:
        calls.append({kind: [row["step"] for row in rows] for kind, rows in logged.items()})
        return [Recorder()]

    for first_step in (0, 2):
        with MetricsLog(tmp_path, first_step, 9, True, first_step, tensorboard=False, trackers=open_trackers) as log:
            for step in range(first_step, 4):
                log.write({"step": step, **ROW})
            for step in (2, 4):
                log.write_validation(scores(step), is_best=False)
    steps = [("train", step, ["data_wait_s"]) for step in range(4)]
    validations = [("validation", step, ["best"]) for step in (2, 4)]
    assert calls[:8] == [{"train": [], "validation": []}, *steps, *validations, Ending.FINISHED]
    assert calls[8:] == [{"train": [0, 1], "validation": [2]}, *steps[2:], *validations, Ending.FINISHED]
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (StoppedError(3), Ending.KILLED),
        (RankLostError("rank 1 is dead"), Ending.FAILED),
        (ValueError("odd"), Ending.FAILED),
    ],
)
def test_trackers_learn_how_the_run_ended(error: Exception, ending: Ending, tmp_path: Path) -> None:
    endings: list[Ending] = []

    class Recorder:
        close = staticmethod(endings.append)

    with (
        pytest.raises(type(error)),
        MetricsLog(tmp_path, 0, 9, True, tensorboard=False, trackers=lambda _: [Recorder()]),
    ):
        raise error
    assert endings == [ending]
