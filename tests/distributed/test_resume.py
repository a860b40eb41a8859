"""A run that was stopped ends as one left alone, on any number of ranks and ZeRO stage."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llara_dist import __version__
from llara_dist.config import CheckpointConfig, LoraConfig, RunConfig, run_config_from_dict
from llara_dist.ds_config import read_ds_config
from llara_dist.errors import InputError
from llara_dist.training.checkpoints.checkpoint import newest_checkpoint, open_checkpoint
from llara_dist.training.metrics_log import read_metrics
from tests.distributed.checkpoints import (
    load_and_save,
    save_where_the_projector_began_late,
    train_on_a_disk_that_fills,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.training import train_all, train_until
from tests.runs import ROOT, run_config

STEPS = 40
FILES = ("adapter_model.safetensors", "projector.safetensors", "optimizer.safetensors")


def command(inputs: Path, out: Path, *options: str) -> list[str]:
    """`llara-dist train` for the small run, dropout on, a checkpoint every three steps."""
    return [
        *(sys.executable, "-m", "llara_dist.cli", "train"),
        *("--model.path", str(inputs / "llm"), "--data.shards", str(inputs / "shards")),
        *("--recommender.path", str(inputs / "rec"), "--out", str(out), "--data.global_batch_samples", "7"),
        *("--data.max_tokens_per_microbatch", "600", "--data.max_steps", str(STEPS), "--data.workers", "0"),
        *("--data.epochs", "3", "--checkpoint.every_steps", "3", "--device", "cpu", *options),
    ]


def final(run: Path) -> Path:
    return run / "checkpoints" / f"step-{STEPS:08d}"


def test_killed_in_mid_step_and_resumed_is_bit_for_bit(inputs: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(inputs, whole), env=environment, cwd=ROOT, check=True, capture_output=True, timeout=200)
    kills = 0
    for target in (8, 20):
        process = subprocess.Popen(
            command(inputs, cut, "--resume", "auto"),
            env=environment,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while len(read_metrics(cut / "metrics.jsonl")) < target and process.poll() is None:
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.002)
        time.sleep(0.01)  # into the next step
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        assert not final(cut).exists()
    assert kills == 2
    subprocess.run(
        command(inputs, cut, "--resume", "auto"),
        env=environment,
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=200,
    )
    for name in FILES:
        assert (final(whole) / name).read_bytes() == (final(cut) / name).read_bytes(), name
    steps = [row["step"] for row in read_metrics(cut / "metrics.jsonl")]
    assert steps == list(range(STEPS))
    losses = [[row["loss"] for row in read_metrics(run / "metrics.jsonl")] for run in (whole, cut)]
    assert losses[0] == losses[1]


MOVED_STEPS, STOPPED = 18, 6
"""of a run that goes on elsewhere: all steps, and those before it is stopped"""


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run left alone, on one rank."""
    config = run_config(inputs, tmp_path_factory.mktemp("whole") / "run", max_steps=MOVED_STEPS)
    run_ranks(train_all, 1, config.out.parent / "ranks", [config])
    return config


@pytest.fixture(scope="module")
def stopped(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The same run on two ranks under ZeRO-3, stopped early."""
    config = run_config(inputs, tmp_path_factory.mktemp("stopped") / "run", "zero3", max_steps=MOVED_STEPS)
    run_ranks(train_until, 2, config.out.parent / "ranks", config, STOPPED)
    return config


@pytest.mark.parametrize(
    ("stage", "ranks"), [("zero2", 1), ("zero3", 3), pytest.param("zero1", 4, marks=pytest.mark.long)]
)
def test_saved_on_two_ranks_and_resumed_on_another_world_and_stage(
    inputs: Path, tmp_path: Path, whole: RunConfig, stopped: RunConfig, stage: str, ranks: int
) -> None:
    out = shutil.copytree(stopped.out, tmp_path / "moved")
    resumed = dataclasses.replace(run_config(inputs, out, stage, max_steps=MOVED_STEPS), resume="auto")
    run_ranks(train_all, ranks, tmp_path / "ranks", [resumed])
    expected = {row["step"]: row["loss"] for row in read_metrics(whole.out / "metrics.jsonl")}
    found = {row["step"]: row["loss"] for row in read_metrics(out / "metrics.jsonl")}
    assert sorted(found) == list(range(STOPPED, MOVED_STEPS))
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-5), step
    theirs, ours = (
        load_file(run / "checkpoints" / f"step-{MOVED_STEPS:08d}" / "optimizer.safetensors") for run in (whole.out, out)
    )
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() / value.norm().clamp_min(1e-12) < 1e-4, name


@pytest.mark.long
def test_every_stage_gives_back_what_it_was_given(inputs: Path, tmp_path: Path) -> None:
    """Masters, moments and each parameter's own count of updates, loaded and saved at once, on other ranks."""
    first = run_config(inputs, tmp_path / "first", "zero2", max_steps=STEPS)
    run_ranks(save_where_the_projector_began_late, 2, tmp_path / "ranks-first", first)
    given = load_file(first.out / "checkpoints" / "step-00000003" / "optimizer.safetensors")
    counts = {name: float(value) for name, value in given.items() if name.startswith("step/")}
    assert set(counts.values()) == {3.0, 1.0}
    assert all(count == (1.0 if name.startswith("step/projector.") else 3.0) for name, count in counts.items())
    configs = [
        dataclasses.replace(
            run_config(inputs, shutil.copytree(first.out, tmp_path / stage), stage, max_steps=STEPS), resume="auto"
        )
        for stage in ("zero0", "zero1", "zero2", "zero3")
    ]
    run_ranks(load_and_save, 3, tmp_path / "ranks-second", configs)
    for config in configs:
        found = load_file(config.out / "again" / "step-00000003" / "optimizer.safetensors")
        assert found.keys() == given.keys()
        different = [name for name, value in given.items() if not torch.equal(found[name], value)]
        assert not different, (config.out.name, different)


def test_a_run_whose_last_checkpoint_does_not_fit_ends_with_two_and_one_line(inputs: Path, tmp_path: Path) -> None:
    arguments = [*command(inputs, tmp_path / "run"), "--data.max_steps", "4"]
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "-", *arguments]  # KiB; the optimizer's file is larger
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(limited, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2, done.stderr
    folder = tmp_path / "run" / "checkpoints"
    assert f"{folder}: the checkpoint of step 3 was not written (File too large)" in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert f"{folder}: the checkpoint of step 4 was not written (File too large)" in last
    assert "nothing is saved yet; raise the limit on the size of files (ulimit -f)" in last
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("fails", "must_fail", "kept"), [({2}, False, [4, 6]), ({4, 6}, True, [2])])
def test_a_full_disk_ends_the_run_on_every_rank_only_if_nothing_is_saved_at_its_end(
    inputs: Path, tmp_path: Path, fails: set[int], must_fail: bool, kept: list[int]
) -> None:
    config = run_config(inputs, tmp_path / "run", "zero1", max_steps=6)
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=2, keep_last=2))
    run_ranks(train_on_a_disk_that_fills, 2, tmp_path / "ranks", config, fails, must_fail)
    folder = config.out / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in kept]
    told = [(config.out / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert told[0] == told[1]
    assert ("step 6 was not written" in told[0]) == must_fail
    assert ("the run is safe up to step 2" in told[0]) == must_fail


@pytest.fixture(scope="module")
def short(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run of eight steps with a checkpoint every two, two of them kept."""
    out = tmp_path_factory.mktemp("short") / "run"
    config = run_config(inputs, out, max_steps=8)
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=2, keep_last=2))
    run_ranks(train_all, 1, out.parent / "ranks", [config])
    return config


def test_a_run_is_told_from_its_checkpoint(short: RunConfig, inputs: Path) -> None:
    state = json.loads((short.out / "checkpoints" / "step-00000008" / "state.json").read_text())
    shards = json.loads((inputs / "shards" / "shards.json").read_text())
    assert (state["format_version"], state["step"], state["total_steps"], state["world_size"]) == (1, 8, 8, 1)
    assert datetime.fromisoformat(state["created"]).utcoffset() == timedelta(0)
    assert run_config_from_dict(state["config"]) == short
    assert state["ds_config"] == read_ds_config(short.deepspeed)
    assert state["data"] == {
        "shards": shards["hash"],
        "plan": state["contract"]["plan"],
        "dataset": {"name": "small", "hash": shards["dataset"]["hash"]},
        "tokenizer": shards["tokenizer_hash"],
        "recommender": "sasrec",
        "item_table": state["contract"]["item_table"],
        "base_model": state["contract"]["base_model"],
    }
    assert state["code"]["version"] == __version__
    assert state["versions"]["torch"] == torch.__version__
    assert state["hosts"] == {socket.gethostname(): {"ranks": 1, "devices": ["cpu"]}}


def test_only_the_last_checkpoints_are_kept(short: RunConfig) -> None:
    assert sorted(path.name for path in (short.out / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]


def test_adapter_loads_in_plain_peft(short: RunConfig, inputs: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    from llara_dist.stream.batch import collate
    from llara_dist.training.checkpoints.trained import load_trained
    from tests.tiny import make_sample

    path = short.out / "checkpoints" / "step-00000008"
    base = AutoModelForCausalLM.from_pretrained(inputs / "llm", dtype=torch.float32)
    plain = peft.PeftModel.from_pretrained(base, str(path)).eval()
    trained = load_trained(short.out, torch.device("cpu"))
    ours = {name.removeprefix("llm."): p for name, p in trained.model.lora_parameters().items()}
    theirs = {name: p for name, p in plain.named_parameters() if "lora_" in name}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(bool(p.abs().sum() > 0) for name, p in theirs.items() if "lora_B" in name)
    batch = collate([make_sample(0)], [False])
    assert torch.isfinite(trained.model(batch))


def test_damaged_checkpoint_is_passed_over(short: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(short.out / "checkpoints", folder)
    newest = folder / "step-00000008" / "optimizer.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"optimizer.safetensors: content differs from the completion marker"):
        open_checkpoint(newest.parent)
    found = newest_checkpoint(folder)
    assert found is not None
    assert found.step == 6
    (folder / "step-00000006" / "complete.json").unlink()
    assert newest_checkpoint(folder) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "plan was"),
        ({"lora": LoraConfig(rank=4, dropout=0.0)}, "lora.rank was 8, now 4"),
    ],
)
def test_another_run_is_not_resumed(short: RunConfig, change: dict, message: str) -> None:
    from llara_dist.distributed import World
    from llara_dist.training.preflight.examine import open_inputs

    with pytest.raises(InputError, match=message):
        open_inputs(dataclasses.replace(short, resume="auto", **change), World())


def test_two_runs_in_one_process(inputs: Path, tmp_path: Path) -> None:
    """What a notebook does: the process group of the first run is gone when the second begins."""
    code = (
        "import sys; from pathlib import Path; from llara_dist.tuning import train; "
        "from llara_dist.distributed import end_process; from tests.runs import run_config; "
        "[train(run_config(Path(sys.argv[1]), Path(sys.argv[2]) / name, 'zero2', max_steps=2)) for name in 'ab']; "
        "end_process(0)"  # as the command ends
    )
    arguments = [sys.executable, "-c", code, str(inputs), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab")
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


def test_base_fingerprint_reads_the_files_that_the_index_names(inputs: Path, tmp_path: Path) -> None:
    from llara_dist.config import ModelConfig
    from llara_dist.model.llama import base_fingerprint

    folder = shutil.copytree(inputs / "llm", tmp_path / "llm")
    whole = base_fingerprint(ModelConfig(path=str(folder)))
    assert whole == base_fingerprint(ModelConfig(path=str(inputs / "llm")))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(InputError, match=r"has no model.safetensors"):
        base_fingerprint(ModelConfig(path=str(folder)))
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert base_fingerprint(ModelConfig(path=str(folder))) != whole
