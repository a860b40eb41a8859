"""A training run as a job of a real Slurm: told to stop, pre-empted, cancelled, short of a rank or a node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from llara_dist.cluster.requeues import read_requeues
from llara_dist.supervision.rank_status import read_statuses
from llara_dist.training.checkpoints.checkpoint import open_checkpoint
from llara_dist.training.metrics_log import read_metrics
from tests.cluster.hosts import clean_environment
from tests.cluster.slurm import Slurm
from tests.runs import ROOT

pytestmark = [pytest.mark.long]

STEPS = 150
EVERY = 50
"""steps between two checkpoints"""
FILES = ("adapter_model.safetensors", "projector.safetensors", "optimizer.safetensors")
PLACE = (
    "--nodes=2",
    "--ntasks-per-node=1",
    "--gpus-per-node=0",
    "--cpus-per-task=1",
    "--time=20",
    "--signal=B:USR1@60",
)
Submit = Callable[..., str]


@pytest.fixture(scope="module")
def config(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of some ten seconds, in a file."""
    settings = {
        "model": {"path": str(inputs / "llm"), "bits": 4},
        "recommender": {"path": str(inputs / "rec")},
        "data": {
            "shards": str(inputs / "shards"),
            "epochs": 9,
            "max_steps": STEPS,
            "global_batch_samples": 7,
            "max_tokens_per_microbatch": 600,
            "workers": 0,
        },
        "lora": {"dropout": 0.0},
        "checkpoint": {"every_steps": EVERY},
        "faults": {"heartbeat_s": 0.5},
        "device": "cpu",
    }
    path = tmp_path_factory.mktemp("config") / "a run's $(settings).yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def submit(slurm: Slurm, config: Path, tmp_path: Path) -> Submit:
    """Submit launch/train.sbatch from the checkout, on two nodes with a rank each."""

    def give(out: Path, *options: str, place: tuple[str, ...] = ()) -> str:
        words = [*PLACE, f"--output={tmp_path}/%j.out", *place, "launch/train.sbatch", str(config)]
        command = ["sbatch", "--parsable", *words, "--out", str(out), *options]
        environment = {"LLARA_DIST_PYTHON": sys.executable}
        return slurm.check("bash", "-c", 'cd "$0" && "$@"', str(ROOT), *command, env=environment).strip()

    return give


def left_alone(slurm: Slurm, config: Path, folder: Path, *options: str) -> Path:
    """A run on two nodes that nothing happens to."""
    script = f'cd "$0" && sbatch --parsable {" ".join(PLACE)} --output={folder}/out launch/train.sbatch "$@"'
    arguments = [str(ROOT), str(config), "--out", str(folder / "run"), *options]
    job = slurm.check("bash", "-c", script, *arguments, env={"LLARA_DIST_PYTHON": sys.executable}).strip()
    assert slurm.end(job) == "COMPLETED", (folder / "out").read_text()
    assert slurm.job(job)["Restarts"] == "0"
    return folder / "run"


@pytest.fixture(scope="module")
def unstopped(slurm: Slurm, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two nodes, left alone."""
    return left_alone(slurm, config, tmp_path_factory.mktemp("unstopped"))


def wait_for_step(slurm: Slurm, out: Path, step: int) -> None:
    slurm.wait(lambda: len(read_metrics(out / "metrics.jsonl")) > step, 120, f"{out} is at step {step}")


def final(out: Path, steps: int = STEPS) -> Path:
    return out / "checkpoints" / f"step-{steps:08d}"


def assert_same_bytes(one: Path, other: Path, steps: int = STEPS) -> None:
    for name in FILES:
        assert (final(one, steps) / name).read_bytes() == (final(other, steps) / name).read_bytes(), name
    losses = [[row["loss"] for row in read_metrics(run / "metrics.jsonl")] for run in (one, other)]
    assert losses[0] == losses[1]


def assert_close(one: Path, other: Path) -> None:
    losses = [[row["loss"] for row in read_metrics(run / "metrics.jsonl")] for run in (one, other)]
    assert len(losses[0]) == STEPS
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name in FILES[:2]:
        left, right = load_file(final(one) / name), load_file(final(other) / name)
        for key, value in left.items():
            assert ((value - right[key]).norm() / value.norm()).item() <= 1e-5, key


def said(tmp_path: Path, job: str) -> str:
    return (tmp_path / f"{job}.out").read_text()


def test_two_nodes_give_what_one_process_gives(unstopped: Path, config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llara_dist.cli", "train", "--config", str(config), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    state = json.loads((final(unstopped) / "state.json").read_text())
    assert state["world_size"] == 2
    assert_close(unstopped, tmp_path / "run")


def test_a_job_that_is_pre_empted_goes_on_by_itself(slurm: Slurm, submit: Submit, config: Path, tmp_path: Path) -> None:
    longer = ("--data.max_steps", str(2 * STEPS))  # the scheduler looks every other second
    job = submit(tmp_path / "run", *longer, place=("--partition=low", "--exclusive"))
    wait_for_step(slurm, tmp_path / "run", 20)
    other = slurm.submit("--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert slurm.end(other) == "COMPLETED"
    assert slurm.end(job) == "COMPLETED", said(tmp_path, job)
    assert slurm.job(job)["Restarts"] == "1"
    assert "requeueing (stopped)" in said(tmp_path, job)
    assert "going on from step " in said(tmp_path, job)
    (tmp_path / "alone").mkdir()
    assert_same_bytes(left_alone(slurm, config, tmp_path / "alone", *longer), tmp_path / "run", 2 * STEPS)


def test_the_signal_before_the_time_limit_saves_and_requeues_with_paths_unchanged(
    slurm: Slurm, submit: Submit, unstopped: Path, tmp_path: Path
) -> None:
    out = tmp_path / """it's "a" $(touch escaped) run; %j"""
    job = submit(out)
    wait_for_step(slurm, out, 20)
    slurm.check("scancel", "--batch", "--signal=USR1", job)
    assert slurm.end(job) == "COMPLETED", said(tmp_path, job)
    assert slurm.job(job)["Restarts"] == "1"  # though the site has RequeueExit=75 as well
    assert [(requeue.why, requeue.excluded) for requeue in read_requeues(out)] == [("stopped", ())]
    assert not (ROOT / "escaped").exists()
    assert_same_bytes(unstopped, out)


def test_a_cancelled_job_saves_and_stays_cancelled(slurm: Slurm, submit: Submit, tmp_path: Path) -> None:
    job = submit(tmp_path / "run")
    wait_for_step(slurm, tmp_path / "run", 20)
    seen = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    slurm.check("scancel", job)
    assert slurm.end(job) == "CANCELLED"
    assert open_checkpoint(max((tmp_path / "run" / "checkpoints").glob("step-*"))).step >= seen
    assert slurm.job(job)["Restarts"] == "0"
    assert "not requeued: the job is being ended by a user" in said(tmp_path, job)
    assert read_requeues(tmp_path / "run") == []


def test_bad_input_ends_a_job_once(slurm: Slurm, submit: Submit, tmp_path: Path) -> None:
    job = submit(tmp_path / "run", "--data.shards", "/nowhere")
    assert slurm.end(job) == "FAILED"
    assert (slurm.job(job)["ExitCode"], slurm.job(job)["Restarts"]) == ("2:0", "0")
    assert "error: /nowhere" in said(tmp_path, job)


def test_a_run_that_fails_by_itself_is_not_requeued(slurm: Slurm, submit: Submit, tmp_path: Path) -> None:
    rates = ("--optimizer.lora_lr", "1e36", "--optimizer.warmup_fraction", "0", "--faults.max_skipped_steps", "3")
    job = submit(tmp_path / "run", *rates)
    assert slurm.end(job) == "FAILED"
    assert (slurm.job(job)["ExitCode"], slurm.job(job)["Restarts"]) == ("1:0", "0")


def test_a_rank_that_is_killed_costs_its_node_and_the_run_goes_on_elsewhere(
    slurm: Slurm, submit: Submit, unstopped: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = submit(out)
    wait_for_step(slurm, out, 60)
    (victim,) = [record for record in read_statuses(out) if record.rank == 1]
    before = len(read_metrics(out / "metrics.jsonl"))
    slurm.hosts[victim.process.host].check(f"kill -9 {victim.process.pid}")
    after = len(read_metrics(out / "metrics.jsonl"))
    assert slurm.end(job) == "COMPLETED", said(tmp_path, job)
    assert slurm.job(job)["Restarts"] == "1"
    assert slurm.job(job)["ExcNodeList"] == victim.process.host
    assert victim.process.host not in {record.process.host for record in read_statuses(out)}
    (requeue,) = read_requeues(out)
    assert (requeue.why, requeue.blamed) == ("lost", (victim.process.host,))
    # The newest at the kill, which came between these steps; to write one may take ten.
    assert requeue.step in range((before - 10) // EVERY * EVERY, after + 2, EVERY)
    assert "is silent" in said(tmp_path, job) or "is dead" in said(tmp_path, job)
    assert_same_bytes(unstopped, out)


def test_a_node_that_is_lost_is_replaced_and_the_run_goes_on(
    slurm: Slurm, submit: Submit, unstopped: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = submit(out)
    wait_for_step(slurm, out, 60)
    (victim,) = [record.process.host for record in read_statuses(out) if record.rank == 1]
    slurm.hosts[victim].kill()
    try:
        assert slurm.end(job) == "COMPLETED", said(tmp_path, job)
        assert int(slurm.job(job)["Restarts"]) == 1
        assert victim not in {record.process.host for record in read_statuses(out)}
        assert_same_bytes(unstopped, out)
    finally:
        slurm.boot(victim)


def test_a_job_that_may_shrink_goes_on_without_its_batch_host(
    slurm: Slurm, submit: Submit, unstopped: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = submit(out, place=("--nodes=1-2", "--exclude=n3"))
    wait_for_step(slurm, out, 60)
    victim = slurm.job(job)["BatchHost"]
    slurm.hosts[victim].kill()
    try:
        assert slurm.end(job) == "COMPLETED", said(tmp_path, job)
        assert slurm.job(job)["Restarts"] == "1"
        assert [record.process.host for record in read_statuses(out)] == [({"n1", "n2"} - {victim}).pop()]
        assert_close(unstopped, out)
    finally:
        slurm.boot(victim)


@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
def test_ranks_meet_without_a_batch_script(
    slurm: Slurm, config: Path, unstopped: Path, tmp_path: Path, launcher: str
) -> None:
    train = ["launch/train.py", "--config", str(config), "--out", str(tmp_path / "run")]
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("n1 slots=1\nn2 slots=1\n")
    start = {
        "srun": ["srun", sys.executable, *train],
        "deepspeed": [
            *(str(Path(sys.executable).with_name("deepspeed")), "--launcher", "slurm", "--hostfile", str(hostfile)),
            *("--no_ssh_check", "--master_addr", "n1", "--launcher_args=-N2", *train),
        ],
    }[launcher]
    command = ["salloc", "--nodes=2", "--ntasks-per-node=1", *start]
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = slurm.command("bash", "-c", 'cd "$0" && exec "$@"', str(ROOT), *command, env=path, timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((final(tmp_path / "run") / "state.json").read_text())["world_size"] == 2
    assert_same_bytes(unstopped, tmp_path / "run")
