"""How a run ends that is stopped, started twice, loses a rank or gets nowhere: exit code, message, nothing lost."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llara_dist.supervision.process_identity import process_state
from llara_dist.training.checkpoints.checkpoint import open_checkpoint
from llara_dist.training.metrics_log import read_metrics
from tests.runs import ROOT

STEPS = 60
Start = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def start(inputs: Path, tmp_path: Path) -> Iterator[Start]:
    """Start `llara-dist train` on some ranks of their own processes, as a launcher would; all are ended at the end."""
    started: list[subprocess.Popen[str]] = []

    def begin(out: Path, *options: str, ranks: int = 1, environment: dict[str, str] | None = None) -> list:
        rendezvous = tmp_path / f"rendezvous-{len(started)}"
        command = [
            *(sys.executable, "-m", "llara_dist.cli", "train", "--model.path", str(inputs / "llm")),
            *("--data.shards", str(inputs / "shards"), "--recommender.path", str(inputs / "rec"), "--out", str(out)),
            *("--data.global_batch_samples", "7", "--data.max_tokens_per_microbatch", "600", "--data.epochs", "9"),
            *("--data.max_steps", str(STEPS), "--data.workers", "0", "--device", "cpu", "--faults.heartbeat_s", "0.3"),
            *("--checkpoint.every_steps", "1000", *options),
        ]
        processes = []
        for rank in range(ranks):
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={
                        **os.environ,
                        "OMP_NUM_THREADS": "1",
                        "DS_ACCELERATOR": "cpu",
                        "GLOO_SOCKET_IFNAME": "lo",
                        "LLARA_DIST_INIT_METHOD": f"file://{rendezvous}",
                        **places,
                        **(environment or {}),
                    },
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )
        started.extend(processes)
        return processes

    yield begin
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_step(out: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 240
    while len(read_metrics(out / "metrics.jsonl")) <= step:
        assert time.monotonic() < deadline, "the run does not get on"
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.01)


def suspend(processes: list[subprocess.Popen[str]]) -> None:
    """Stop every process where it is, until SIGCONT."""
    for process in processes:
        os.killpg(process.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while any(process_state(process.pid)[0] != "T" for process in processes):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), "it has ended already"
        time.sleep(0.001)


def end(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Of each process: exit code, stdout, stderr."""
    ended = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        ended.append((process.returncode, out, err))
    return ended


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR1), (1, signal.SIGINT)])
def test_a_signal_on_any_rank_saves_within_a_step_and_asks_for_requeueing(
    start: Start, tmp_path: Path, ranks: int, number: signal.Signals
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    validations = ("--validation.every_steps", "1", "--validation.max_new_tokens", "2", "--data.workers", "1")
    assert [code for code, _, _ in end(start(whole, *validations, ranks=ranks))] == [0] * ranks
    processes = start(cut, *validations, ranks=ranks)
    wait_for_step(cut, 5, processes)
    suspend(processes)  # a step takes less time than this test may have to wait for a core
    seen = len(read_metrics(cut / "metrics.jsonl"))
    os.killpg(processes[-1].pid, number)  # its reader processes get it as well
    for process in processes:
        os.killpg(process.pid, signal.SIGCONT)
    processes[-1].send_signal(number)  # and launchers forward signals
    for code, _, err in end(processes):
        assert code == 75, err
    assert "stopped: " in err if ranks == 1 else True
    done = open_checkpoint(max((cut / "checkpoints").glob("step-*"))).step
    assert seen <= done <= seen + 2, "it went on for more than a step"
    for code, out, err in end(start(cut, *validations, "--resume", "auto", ranks=ranks)):
        assert code == 0, err
        assert ranks > 1 or f"going on from step {done} of {STEPS}" in out
    for name in ("adapter_model.safetensors", "projector.safetensors", "optimizer.safetensors"):
        one, other = (load_file(run / "checkpoints" / f"step-{STEPS:08d}" / name) for run in (whole, cut))
        assert all((value == other[key]).all() for key, value in one.items()), name
    # What was due when it was told to stop was validated when it went on; nothing is there twice.
    logs = [(run / "validation.jsonl").read_text().splitlines() for run in (whole, cut)]
    scores = [[{**json.loads(line), "seconds": 0} for line in log] for log in logs]
    assert scores[0] == scores[1]


@pytest.mark.long
def test_a_run_that_is_stopped_before_its_first_step_again_and_again_is_requeued_no_more(
    start: Start, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ends = []
    for restart in range(3):
        job = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(restart)}
        processes = start(out, "--resume", "auto", environment=job)
        deadline = time.monotonic() + 240
        while not (out / f"lock-{restart + 1:06d}.json").exists():  # it loads the weights from here on
            assert time.monotonic() < deadline
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.005)
        processes[0].send_signal(signal.SIGTERM)
        ends += end(processes)
    assert [code for code, _, _ in ends] == [75, 75, 1], ends
    assert "start again with --resume auto to go on" in ends[0][2]
    assert "no use in being requeued" in ends[2][2]
    assert not (out / "checkpoints").exists()
    assert end(start(out, "--resume", "auto"))[0][0] == 0


@pytest.mark.long
def test_a_second_job_is_refused_and_the_first_goes_on(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start(out, "--resume", "auto", "--data.max_steps", "400")
    wait_for_step(out, 1, first)
    ((code, _, err),) = end(start(out, "--resume", "auto", "--data.max_steps", "400"))
    assert code == 2
    assert f"{out}: a run without a job id on" in err
    assert f"pid {first[0].pid}" in err
    assert "choose another --out" in err
    wait_for_step(out, len(read_metrics(out / "metrics.jsonl")), first)


@pytest.mark.long
def test_a_killed_rank_ends_the_others_which_say_who_it_was(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    processes = start(out, "--deepspeed", "ds_configs/zero3.json", ranks=3)
    wait_for_step(out, 3, processes)
    processes[1].kill()
    ended = end(processes)
    assert [code for code, _, _ in ended] == [70, -signal.SIGKILL, 70]
    said = ended[0][2] + ended[2][2]
    assert f"(pid {processes[1].pid}) is dead" in said
    place = re.search(r"last seen in step \d+, (.*)", said)
    assert place is not None, said
    if "ward" in place[1]:  # between two micro-batches it works on no samples
        assert "sample keys" in place[1]
    assert len(list((out / "ranks").glob("stacks-*.txt"))) == 2
    (report,) = (out / "ranks").glob("lost-*.txt")
    assert "rank 1 of 3" in report.read_text()


@pytest.mark.long
def test_validation_ends_a_run_early_and_it_stays_ended(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # A rate of next to nothing: no validation is better than the first but by rounding of the loss.
    options = ("--validation.every_steps", "3", "--validation.patience", "2", "--validation.generation", "false")
    rates = ("--optimizer.lora_lr", "1e-30", "--optimizer.projector_lr", "1e-30", "--json")
    ((code, said, err),) = end(start(out, *options, *rates))
    assert code == 0, err
    result = json.loads(said.splitlines()[-1])
    assert (result["steps"], result["stopped_early"]) == (9, True)
    best = json.loads((out / "checkpoints" / "best.json").read_text())
    assert best["step"] == 3
    assert sorted(path.name for path in (out / "checkpoints").glob("step-*")) == ["step-00000003", "step-00000009"]
    ((code, said, _),) = end(start(out, *options, *rates, "--resume", "auto"))
    assert code == 0
    assert json.loads(said.splitlines()[-1]) == {**result, "loss": None}


@pytest.mark.long
def test_a_run_that_has_diverged_ends_with_the_samples_it_could_not_use(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    rates = ("--optimizer.lora_lr", "1e36", "--optimizer.warmup_fraction", "0", "--faults.max_skipped_steps", "3")
    ended = end(start(out, *rates, ranks=2))
    assert [code for code, _, _ in ended] == [1, 1]
    assert "faults.max_skipped_steps=3. Sample keys: " in ended[0][2]
    assert "Traceback" not in ended[0][2]
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["skipped"] * 4
    assert all(event["keys"] for event in events)
    assert [row["loss"] for row in read_metrics(out / "metrics.jsonl")][-3:] == [None] * 3


@pytest.mark.long
def test_a_profile_and_what_a_step_cost(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for code, _, err in end(start(out, "--profile", "--data.max_steps", "8", ranks=2)):
        assert code == 0, err
    with gzip.open(out / "profile" / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"aten::mm", "autograd::engine::evaluate_function: MmBackward0"} & names
    assert "Self CPU" in (out / "profile" / "operators.txt").read_text()
    rows = read_metrics(out / "metrics.jsonl")
    for row in rows:
        parts = row["forward_s"] + row["backward_s"] + row["update_s"]
        assert 0 < parts <= row["step_s"]
        assert min(row[name] for name in ("forward_s", "backward_s", "update_s", "tflops_per_s")) > 0
        assert row["mfu"] is None  # no data sheet says what this CPU can
    # Stage 0 sends every trained float32 element once around the ring of two.
    trained = sum(
        value.numel() for value in load_file(out / "checkpoints/step-00000008/optimizer.safetensors").values()
    )
    masters = (trained - 32) / 3  # masters, two moments, and a step count for each of 32 parameters
    assert rows[-1]["communication_mib"] * 2**20 == pytest.approx(4 * masters)
