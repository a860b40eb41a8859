"""`llara-dist submit`, `status`, `logs` and `cancel` on a real Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llara_dist.training.checkpoints.checkpoint import newest_checkpoint
from tests.cluster.slurm import Slurm
from tests.runs import ROOT

pytestmark = [pytest.mark.long]

AWKWARD = "a b'\"$(touch x)%j"
ON_TWO = ("--nodes", "2", "--gpus_per_node", "1", "--cpus_per_task", "1", "--time", "20")
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cluster whose tasks need a line of set-up."""
    path = tmp_path_factory.mktemp("site") / "site.yaml"
    path.write_text(yaml.safe_dump({"gpus": "gres", "setup": ["echo set up for $SLURM_PROCID"]}))
    return path


@pytest.fixture
def command(slurm: Slurm, site: Path) -> Command:
    """Run a command of llara-dist from the checkout, as a user on the login node."""

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        given = ["bash", "-c", 'cd "$0" && "$@"', ROOT, sys.executable, "-m", "llara_dist.cli", *words]
        return slurm.command(*given, env={"LLARA_DIST_SITE": str(site), "PYTHONPATH": str(ROOT)})

    return run


@pytest.fixture(scope="module")
def config(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, in a file."""
    settings = {
        "model": {"path": str(inputs / "llm")},
        "recommender": {"path": str(inputs / "rec")},
        "data": {
            "shards": str(inputs / "shards"),
            "epochs": 9,
            "max_steps": 6,
            "global_batch_samples": 7,
            "max_tokens_per_microbatch": 600,
            "workers": 0,
        },
        "lora": {"dropout": 0.0},
        "faults": {"heartbeat_s": 0.5},
        "device": "cpu",
    }
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a command with --json says in its last line."""
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_in_a_folder_with_an_awkward_name(slurm: Slurm, command: Command, config: Path, tmp_path: Path) -> None:
    out = tmp_path / AWKWARD
    words = ("submit", "--config", config, "--out", out, *ON_TWO)
    shown = command(*words, "--dry_run")
    assert shown.returncode == 0, shown.stderr
    assert "llara_dist.cluster.in_job train" in shown.stdout
    assert "to start at" in shown.stdout
    assert not out.exists()

    (job,) = result(command(*words, "--json"))["jobs"]
    again = command(*words)
    assert again.returncode == 2
    assert f"job {job['id']} (train)" in again.stderr
    assert slurm.end(job["id"]) == "COMPLETED", command("logs", out).stdout

    status = result(command("status", out, "--json"))
    (run,), (row,) = status["runs"], status["jobs"]
    assert (run["step"], run["of"], run["ranks"], run["ended"]) == (6, 6, 2, "in order")
    assert (row["job"], row["state"], row["restarts"], row["exit"]) == (job["id"], "COMPLETED", 0, "0:0")
    output = out / "jobs" / "1" / f"slurm-{job['id']}.out"
    assert {"set up for 0", "set up for 1"} <= set(output.read_text().splitlines())
    logs = command("logs", out, "--lines", "0", "--follow")  # ends by itself: the job is over
    assert logs.stdout == f"==> {output} <==\n{output.read_text()}"
    over = command("cancel", out)
    assert over.returncode == 0, over.stderr
    assert "no job waits or runs" in over.stdout
    assert not (ROOT / "x").exists()


def test_what_slurm_refuses_is_said_in_its_words(command: Command, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for options, words in ((("--partition", "nope"), "invalid partition"), (("--nodes", "5"), "node configuration")):
        done = command("submit", "--config", config, "--out", out, *options, "--check", "false")
        assert done.returncode == 2
        assert done.stderr.startswith("error: sbatch: ")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_an_array_is_one_run_for_each_index(slurm: Slurm, command: Command, config: Path, tmp_path: Path) -> None:
    words = ("--out", f"{tmp_path}/it's/seed-{{index}}", "--seed", "{index}", "--array", "3-4", "--cpus_per_task", "1")
    (job,) = result(command("submit", "--config", config, *words, "--json"))["jobs"]
    for index in (3, 4):
        run = tmp_path / "it's" / f"seed-{index}"
        assert slurm.end(f"{job['id']}_{index}") == "COMPLETED", command("logs", run).stdout
        assert json.loads((run / "config.json").read_text())["seed"] == index
        (row,) = result(command("status", run, "--json"))["jobs"]
        assert row["job"] == f"{job['id']}_{index}"
    assert len(result(command("status", tmp_path / "it's", "--json"))["runs"]) == 2


def test_a_run_that_is_cancelled_keeps_a_checkpoint(
    slurm: Slurm, command: Command, config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ("--data.max_steps", "0", "--data.epochs", "1000", *ON_TWO)
    (job,) = result(command("submit", "--config", config, "--out", out, *options, "--json"))["jobs"]

    def steps() -> int:
        runs = result(command("status", out, "--json"))["runs"]
        return runs[0]["step"] if runs else 0

    slurm.wait(lambda: steps() > 2, 120, "the run has done some steps")
    cancelled = command("cancel", out)
    assert cancelled.returncode == 0, cancelled.stderr
    assert f"train: cancelled job {job['id']}, which was running" in cancelled.stdout
    assert slurm.end(job["id"]) == "CANCELLED"
    slurm.wait(lambda: newest_checkpoint(out / "checkpoints"), 60, "a checkpoint is saved")
    assert slurm.job(job["id"])["Restarts"] == "0"


def test_a_pipeline_from_nothing_to_its_report(slurm: Slurm, command: Command, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    file, out = tmp_path / "in" / "pipeline.yaml", tmp_path / AWKWARD
    model = str(inputs / "llm")
    run = {"model.path": model, "device": "cpu", "data.epochs": 1, "data.workers": 0, "data.max_steps": 2}
    steps = {
        "prepare": {"options": {"recipe": str(inputs / "small.yaml")}},
        "recommender": {"options": {"epochs": 1}},
        "shards": {"parts": 2, "options": {"tokenizer": model, "processes": 1}},
        "train": {"nodes": 2, "gpus_per_node": 1, "options": run},
        "evaluate": {"gpus_per_node": 2, "options": {"device": "cpu", "max_new_tokens": 4, "limit": 0}},
        "report": {},
    }
    file.write_text(yaml.safe_dump({"resources": {"time": "0:20:00", "cpus_per_task": 1}, "steps": steps}))
    words = ("submit", "--pipeline", file, "--out", out, "--json")
    jobs = {job["step"]: job["id"] for job in result(command(*words))["jobs"]}
    assert list(jobs) == ["prepare", "recommender", "shards", "merge", "train", "evaluate", "report"]
    assert command(*words).returncode == 2  # they are under way
    assert slurm.end(jobs["report"], limit_s=480) == "COMPLETED", (
        command("status", out).stdout + command("logs", out).stdout
    )
    assert "HR@1" in (out / "report.html").read_text()
    assert len(result(command("status", out, "--json"))["jobs"]) == 8  # two of them parts of the shards

    assert result(command(*words)) == {"jobs": []}
    os.remove(out / "report.html")
    assert [job["step"] for job in result(command(*words, "--dry_run"))["jobs"]] == ["report"]


def test_nothing_waits_for_ever_for_a_step_that_failed(
    slurm: Slurm, command: Command, inputs: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "pipeline.yaml", tmp_path / "out"
    steps = {"prepare": {"options": {"recipe": str(tmp_path / "none.yaml")}}, "recommender": {}}
    file.write_text(yaml.safe_dump({"steps": steps}))
    jobs = {
        job["step"]: job["id"] for job in result(command("submit", "--pipeline", file, "--out", out, "--json"))["jobs"]
    }
    assert slurm.end(jobs["recommender"]) == "CANCELLED"
    assert slurm.state(jobs["prepare"]) == "FAILED"
    assert "none.yaml" in command("logs", out).stdout
    assert slurm.job(jobs["prepare"])["ExitCode"] == "2:0"
