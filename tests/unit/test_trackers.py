"""Trackers get every row once, over restarts as well; one that is away costs the run nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llara_dist.config import DataConfig, RunConfig, TrackingConfig
from llara_dist.errors import FindingsError
from llara_dist.training import trackers
from llara_dist.training.trackers import Background, Row, check_tracking, open_trackers, without_secrets
from tests.runs import ROOT


class Recorder:
    """A service that fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.rows: list[Row] = []
        self.closed = False

    def send(self, rows: list[Row]) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("https://me:secret@example.org/api?key=hidden is away")
        self.rows += rows

    def close(self) -> None:
        self.closed = True


def test_every_row_comes_once_and_in_order() -> None:
    service = Recorder()
    background = Background("service", lambda: service, {"train": 2, "validation": 4})
    for step in range(200):
        background.log("train", step, {"loss": 1, "mfu": 0.5})
    for step in (4, 8):
        background.log("validation", step, {"hit_ratio": 0.5})
    background.close()
    steps = [(step, {"train/loss": 1.0, "train/mfu": 0.5}) for step in range(3, 200)]
    assert service.rows == [*steps, (8, {"validation/hit_ratio": 0.5})]
    assert service.closed


def test_an_outage_is_said_once_without_secrets_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "_RETRY_S", 0.01)
    service = Recorder(failures=3)
    background = Background("service", lambda: service, {})
    background.log("train", 0, {"loss": 1.0})
    deadline = time.monotonic() + 60
    while not service.rows:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    background.close()
    assert service.rows == [(0, {"train/loss": 1.0})]
    said = capsys.readouterr().err
    assert said.count("warning: service: ") == 1
    assert "ConnectionError: https://example.org/api is away; the run goes on, and it is tried again" in said


def test_a_service_that_never_answers_holds_up_neither_the_steps_nor_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    monkeypatch.setattr(trackers, "_WAITING", 50)
    answer = threading.Event()

    def begin() -> Recorder:
        answer.wait(60)
        return Recorder()

    background = Background("service", begin, {})
    began = time.monotonic()
    for step in range(100_000):
        background.log("train", step, {"loss": 1.0})
    background.close()
    assert time.monotonic() - began < 30
    assert "it did not take all of the run's rows in time; metrics.jsonl holds every one" in capsys.readouterr().err
    answer.set()


def test_a_missing_package_is_bad_input_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    check_tracking(TrackingConfig())
    with pytest.raises(FindingsError) as caught:
        check_tracking(TrackingConfig(wandb="llara", mlflow="llara"))
    lines = [finding.line for finding in caught.value.findings]
    assert lines[0] == "tracking.wandb=llara: wandb is not installed; pip install wandb, or leave tracking.wandb empty"
    assert "pip install mlflow-skinny" in lines[1]


def test_no_secret_leaves_the_machine() -> None:
    given = {
        "a": ["s3://key:secret@host/path?token=x", 3],
        "b": {"c": "git@host:x"},
        "d": "https://host/?q=1 and so on",
    }
    assert without_secrets(given) == {
        "a": ["s3://host/path", 3],
        "b": {"c": "git@host:x"},
        "d": "https://host/ and so on",
    }


def test_which_run_it_is_and_what_was_handed_over_outlives_restarts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    services: list[tuple[str, Recorder]] = []

    def begin(settings: Any, out: Path, run_id: str, config: Any) -> Recorder:
        services.append((run_id, Recorder()))
        return services[-1][1]

    monkeypatch.setattr(trackers, "WandbRun", begin)
    config = RunConfig(out=tmp_path, tracking=TrackingConfig(wandb="p"))

    def start(first_step: int, end: int, logged: int) -> list[int]:
        """Returns the steps that the service was sent; it is not even opened where there are none."""
        known = len(services)
        (background,) = open_trackers(config, {"train": logged, "validation": -1})
        for step in range(first_step, end):
            background.log("train", step, {"loss": 1.0})
        background.close()
        return [step for _, service in services[known:] for step, _ in service.rows]

    assert start(0, 38, logged=-1) == list(range(38))
    assert start(30, 34, logged=37) == []
    # The second start's log ended at step 33, yet the service knows 37.
    assert start(30, 40, logged=33) == [38, 39]
    assert len({run_id for run_id, _ in services}) == 1
    config = dataclasses.replace(config, tracking=TrackingConfig(wandb="another"))
    assert start(30, 32, logged=39) == [30, 31]
    assert len({run_id for run_id, _ in services}) == 2


WRITE = """
import sys
from pathlib import Path
from llara_dist.config import DataConfig, RunConfig, TrackingConfig
from llara_dist.training import trackers
from llara_dist.training.trackers import open_trackers
first, end, logged = map(int, sys.argv[2:5])
trackers.CLOSE_S = float(sys.argv[6])
tracking = TrackingConfig(name="tuned", **{sys.argv[5]: "llara"})
config = RunConfig(out=Path(sys.argv[1]), tracking=tracking, data=DataConfig(shards="https://me:secret@host/shards"))
config.out.mkdir(exist_ok=True)
(background,) = open_trackers(config, {"train": logged, "validation": -1})
for step in range(first, end):
    background.log("train", step, {"loss": 1.0 / (step + 1)})
background.close()
"""


def write(out: Path, first: int, end: int, logged: int, name: str, close_s: float = 100, **environment: str) -> str:
    """One start in a process of its own; returns what it said."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(out), str(first), str(end), str(logged), name, str(close_s)],
        cwd=out.parent,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "HOME": str(out.parent),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.long
def test_mlflow_goes_on_in_the_same_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    address = f"sqlite:///{tmp_path}/mlflow.db"
    for first, end, logged in ((0, 8, -1), (5, 9, 7)):
        said = write(tmp_path / "run", first, end, logged, "mlflow", MLFLOW_TRACKING_URI=address)
        assert "warning: mlflow" not in said
    client = mlflow.MlflowClient(tracking_uri=address)
    (run,) = client.search_runs([client.get_experiment_by_name("llara").experiment_id])
    assert run.info.run_name == "tuned"
    assert run.info.status == "FINISHED"
    assert run.data.params["data.shards"] == "https://host/shards"
    assert run.data.params["lora.rank"] == "8"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(9))
    assert json.loads((tmp_path / "run" / "tracking.json").read_text())["mlflow"]["id"] == run.info.run_id


@pytest.mark.long
def test_wandb_offline_writes_both_starts_under_one_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for first, end, logged in ((0, 8, -1), (5, 9, 7)):
        said = write(tmp_path / "run", first, end, logged, "wandb", WANDB_MODE="offline")
        assert "warning: wandb" not in said
        time.sleep(1.1)  # its folders are named by the second
    run_id = json.loads((tmp_path / "run" / "tracking.json").read_text())["wandb"]["id"]
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2
    first_text, second_text = (file.read_bytes() for file in files)
    assert first_text.count(b"train/loss") >= 8
    assert b"secret" not in first_text + second_text
    assert b"tuned" in first_text


def test_wandb_without_a_server_costs_a_line(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    began = time.monotonic()
    said = write(tmp_path / "run", 0, 3, -1, "wandb", close_s=3, **away)
    assert time.monotonic() - began < 30
    assert "it did not take all of the run's rows in time" in said
    assert "a" * 40 not in said


def test_config_with_tracking_is_rebuilt() -> None:
    from llara_dist.config import run_config_from_dict, to_dict

    config = RunConfig(data=DataConfig(shards="x"), tracking=TrackingConfig(mlflow="m", tensorboard=False))
    assert run_config_from_dict(to_dict(config)) == config
    old = {name: value for name, value in to_dict(RunConfig()).items() if name != "tracking"}
    assert run_config_from_dict(old) == RunConfig()
