"""Trackers get every row once, over restarts as well; one that is away costs the run nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import select
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
from llara_dist.training.trackers import Background, Ending, Memory, Row, check_tracking, open_trackers, without_secrets
from tests.runs import ROOT


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waits for a core is no service that never answers."""
    monkeypatch.setattr(trackers, "CLOSE_S", 100.0)


class Recorder:
    """A service that fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.rows: list[Row] = []
        self.ending: Ending | None = None

    def send(self, rows: list[Row]) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("https://me:secret@example.org/api?key=hidden is away")
        self.rows += rows

    def close(self, ending: Ending) -> None:
        self.ending = ending


def test_every_row_comes_once_and_in_order() -> None:
    service = Recorder()
    background = Background("service", lambda: service, {"train": 2, "validation": 4})
    for step in range(200):
        background.log("train", step, {"loss": 1, "mfu": 0.5})
    for step in (4, 8):
        background.log("validation", step, {"hit_ratio": 0.5})
    background.close(Ending.KILLED)
    steps = [("train", step, {"train/loss": 1.0, "train/mfu": 0.5}) for step in range(3, 200)]
    assert service.rows == [*steps, ("validation", 8, {"validation/hit_ratio": 0.5})]
    assert service.ending is Ending.KILLED


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
    assert service.rows == [("train", 0, {"train/loss": 1.0})]
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

    def start(first_step: int, end: int) -> list[int]:
        """Returns the steps that the service was sent; it is not even opened where there are none."""
        known = len(services)
        (background,) = open_trackers(config, {"train": rows(first_step)})
        for step in range(first_step, end):
            background.log("train", step, {"loss": 1.0})
        background.close()
        return [step for _, service in services[known:] for _, step, _ in service.rows]

    assert start(0, 38) == list(range(38))
    assert start(30, 34) == []
    # The second start's log ended at step 33, yet the service knows 37.
    assert start(30, 40) == [38, 39]
    assert len({run_id for run_id, _ in services}) == 1
    config = dataclasses.replace(config, tracking=TrackingConfig(wandb="another"))
    assert start(30, 32) == list(range(32))
    assert len({run_id for run_id, _ in services}) == 2


def rows(end: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 1.0, "mfu": None} for step in range(end)]


def test_rows_that_a_service_missed_are_sent_at_the_next_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A start whose service goes away for good after step 7; then one that goes on from that start's log."""
    service = Recorder()
    monkeypatch.setattr(trackers, "MlflowRun", lambda *_: service)
    monkeypatch.setattr(trackers, "_AT_ONCE", 4)
    monkeypatch.setattr(trackers, "_RETRY_S", 0.01)
    config = RunConfig(out=tmp_path, tracking=TrackingConfig(mlflow="e"))
    (background,) = open_trackers(config, {"train": rows(8)})
    deadline = time.monotonic() + 60
    while Memory(tmp_path).of("mlflow", "e")["told"] != {"train": 7}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    service.failures = 10**9
    for step in range(8, 12):
        background.log("train", step, {"loss": 1.0})
    background.close(Ending.FAILED)
    assert [step for _, step, _ in service.rows] == list(range(8))

    service.failures = 0
    (background,) = open_trackers(config, {"train": rows(12), "validation": [{"step": 10, "hit_ratio": 0.5}]})
    background.log("train", 12, {"loss": 1.0})
    background.close()
    late = [("train", 8), ("train", 9), ("validation", 10), ("train", 10), ("train", 11), ("train", 12)]
    assert [(kind, step) for kind, step, _ in service.rows[8:]] == late
    assert Memory(tmp_path).of("mlflow", "e")["told"] == {"train": 12, "validation": 10}


def test_of_a_long_outage_the_newest_rows_are_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Recorder()
    monkeypatch.setattr(trackers, "MlflowRun", lambda *_: service)
    monkeypatch.setattr(trackers, "_CAUGHT_UP", 5)
    config = RunConfig(out=tmp_path, tracking=TrackingConfig(mlflow="e"))
    (background,) = open_trackers(config, {"train": rows(900)})
    background.close()
    assert [step for _, step, _ in service.rows] == list(range(895, 900))
    assert "mlflow: of 900 rows that it missed it gets the newest 5" in capsys.readouterr().err


def test_a_state_that_cannot_be_written_costs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    service = Recorder()
    monkeypatch.setattr(trackers, "MlflowRun", lambda *_: service)
    (tmp_path / "tracking.json").mkdir()
    (background,) = open_trackers(RunConfig(out=tmp_path, tracking=TrackingConfig(mlflow="e")), {})
    for step in range(3):
        background.log("train", step, {"loss": 1.0})
    background.close()
    assert [step for _, step, _ in service.rows] == [0, 1, 2]


@pytest.mark.parametrize(
    "text", ["[]", "null", '{"mlflow": []}', '{"mlflow": {"project": "e", "told": [], "id": 3}}', '{"mlfl']
)
def test_a_state_of_another_form_is_as_none(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened = []
    monkeypatch.setattr(trackers, "MlflowRun", lambda *arguments: opened.append(arguments[2]) or Recorder())
    (tmp_path / "tracking.json").write_text(text)
    (background,) = open_trackers(RunConfig(out=tmp_path, tracking=TrackingConfig(mlflow="e")), {"train": rows(2)})
    background.close()
    assert opened == [""]
    assert Memory(tmp_path).of("mlflow", "e")["told"] == {"train": 1}


WRITE = """
import sys
from pathlib import Path
from llara_dist.config import DataConfig, RunConfig, TrackingConfig
from llara_dist.training import trackers
from llara_dist.training.trackers import Ending, open_trackers
first, end = map(int, sys.argv[2:4])
ending = Ending(sys.argv[4])
trackers.CLOSE_S = float(sys.argv[6])
tracking = TrackingConfig(name="tuned", **{sys.argv[5]: "llara"})
config = RunConfig(out=Path(sys.argv[1]), tracking=tracking, data=DataConfig(shards="https://me:secret@host/shards"))
config.out.mkdir(exist_ok=True)
(background,) = open_trackers(config, {})
for step in range(first, end):
    background.log("train", step, {"loss": 1.0 / (step + 1)})
background.close(ending)
"""


def writing(out: Path, first: int, end: int, ending: Ending, name: str, close_s: float, **environment: str) -> dict:
    """How a process is started that is one start of a run."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_", "NETRC"))}
    python_path = os.pathsep.join([str(ROOT), *sys.path])
    return {
        "args": [sys.executable, "-c", WRITE, str(out), str(first), str(end), ending, name, str(close_s)],
        "cwd": out.parent,
        "env": {**kept, "PYTHONPATH": python_path, "HOME": str(out.parent), **environment},
    }


def write(
    out: Path,
    first: int,
    end: int,
    name: str,
    ending: Ending = Ending.FINISHED,
    close_s: float = 100,
    **environment: str,
) -> str:
    """One start in a process of its own; returns what it said."""
    done = subprocess.run(
        **writing(out, first, end, ending, name, close_s, **environment),
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
    client = mlflow.MlflowClient(tracking_uri=address)
    for first, end, ending in ((0, 6, Ending.KILLED), (5, 8, Ending.FAILED), (5, 9, Ending.FINISHED)):
        said = write(tmp_path / "run", first, end, "mlflow", ending, MLFLOW_TRACKING_URI=address)
        assert "warning: mlflow" not in said
        (run,) = client.search_runs([client.get_experiment_by_name("llara").experiment_id])
        assert run.info.status == str(ending)
    assert run.info.run_name == "tuned"
    assert run.data.params["data.shards"] == "https://host/shards"
    assert run.data.params["lora.rank"] == "8"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(9))
    assert json.loads((tmp_path / "run" / "tracking.json").read_text())["mlflow"]["id"] == run.info.run_id


@pytest.mark.long
def test_wandb_offline_writes_both_starts_under_one_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for first, end, ending in ((0, 8, Ending.FAILED), (5, 9, Ending.FINISHED)):
        said = write(tmp_path / "run", first, end, "wandb", ending, WANDB_MODE="offline")
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
    said = write(tmp_path / "run", 0, 3, "wandb", close_s=3, **away)
    assert time.monotonic() - began < 100
    assert "it did not take all of the run's rows in time" in said
    assert "a" * 40 not in said


def test_wandb_without_a_key_asks_nobody_on_a_terminal(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        **writing(tmp_path / "run", 0, 3, Ending.FINISHED, "wandb", 100.0), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said, deadline = b"", time.monotonic() + 120
    try:
        while process.poll() is None or select.select([ours], [], [], 0)[0]:
            assert time.monotonic() < deadline, said.decode()
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    said += os.read(ours, 1 << 16)
                except OSError:  # the other end is closed
                    break
        assert process.wait(60) == 0, said.decode()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)
    first, *others = said.decode().splitlines()
    assert first.startswith("warning: wandb: ConnectionError: no API key: set WANDB_API_KEY, or run `wandb login`, or ")
    assert others == [
        "warning: wandb: it did not take all of the run's rows in time; metrics.jsonl holds every one",
    ]


CHECK = """
import os, sys
from llara_dist.config import TrackingConfig
from llara_dist.errors import InputError
from llara_dist.training.trackers import check_tracking
try:
    check_tracking(TrackingConfig(wandb="llara"), is_main=sys.argv[1] == "0")
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("rank", "environment", "found"),
    [
        (0, {}, "tracking.wandb=llara: W&B has no API key; set WANDB_API_KEY, or run `wandb login`, or set WANDB_MODE"),
        (1, {}, ""),
        (0, {"WANDB_API_KEY": "a" * 40}, ""),
        (0, {"WANDB_API_KEY": "short"}, "tracking.wandb=llara: WANDB_API_KEY invalid: "),
        (0, {"WANDB_MODE": "offline"}, ""),
        (0, {"WANDB_MODE": "disabled"}, ""),
    ],
)
def test_a_missing_key_is_found_before_training(
    rank: int, environment: dict[str, str], found: str, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    setup = writing(tmp_path / "run", 0, 0, Ending.FINISHED, "wandb", 0.0, **environment)
    setup["args"] = [sys.executable, "-c", CHECK, str(rank)]
    done = subprocess.run(**setup, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(found)
    assert bool(done.stdout) == bool(found)
    assert done.stdout.count("\n") <= 1


def test_config_with_tracking_is_rebuilt() -> None:
    from llara_dist.config import run_config_from_dict, to_dict

    config = RunConfig(data=DataConfig(shards="x"), tracking=TrackingConfig(mlflow="m", tensorboard=False))
    assert run_config_from_dict(to_dict(config)) == config
    old = {name: value for name, value in to_dict(RunConfig()).items() if name != "tracking"}
    assert run_config_from_dict(old) == RunConfig()
