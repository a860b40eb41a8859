"""A run that was stopped ends as one left alone, on any number of ranks and ZeRO stage."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llara_dist.config import CheckpointConfig, LoraConfig, RunConfig
from llara_dist.errors import InputError
from llara_dist.training.checkpoint import newest_checkpoint, open_checkpoint, rotate
from llara_dist.training.metrics_log import read_metrics
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


@pytest.mark.parametrize(
    ("first", "second"), [(("zero3", 2), ("zero1", 3)), (("zero2", 3), ("zero0", 1)), (("zero0", 1), ("zero3", 3))]
)
def test_resume_on_another_world_and_stage(
    inputs: Path, tmp_path: Path, first: tuple[str, int], second: tuple[str, int]
) -> None:
    whole = run_config(inputs, tmp_path / "whole", max_steps=STEPS)
    run_ranks(train_all, 1, tmp_path / "ranks-whole", [whole])
    out = tmp_path / "moved"
    run_ranks(train_until, first[1], tmp_path / "ranks-first", run_config(inputs, out, first[0], max_steps=STEPS), 17)
    resumed = dataclasses.replace(run_config(inputs, out, second[0], max_steps=STEPS), resume="auto")
    run_ranks(train_all, second[1], tmp_path / "ranks-second", [resumed])
    expected = {row["step"]: row["loss"] for row in read_metrics(whole.out / "metrics.jsonl")}
    found = {row["step"]: row["loss"] for row in read_metrics(out / "metrics.jsonl")}
    assert sorted(found) == list(range(17, STEPS))
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-5), step
    theirs, ours = (load_file(final(run) / "optimizer.safetensors") for run in (whole.out, out))
    for name, value in theirs.items():
        assert (ours[name] - value).norm() / value.norm().clamp_min(1e-12) < 1e-4, name


@pytest.fixture(scope="module")
def short(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run of eight steps with a checkpoint every two, two of them kept."""
    out = tmp_path_factory.mktemp("short") / "run"
    config = run_config(inputs, out, max_steps=8)
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=2, keep_last=2))
    run_ranks(train_all, 1, out.parent / "ranks", [config])
    return config


def test_only_the_last_checkpoints_are_kept(short: RunConfig) -> None:
    assert sorted(path.name for path in (short.out / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]


def test_adapter_loads_in_plain_peft(short: RunConfig, inputs: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    from llara_dist.stream.batch import collate
    from llara_dist.training.trained import load_trained
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
    import shutil

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
        ({"lora": LoraConfig(rank=4, dropout=0.0)}, "lora was"),
    ],
)
def test_another_run_is_not_resumed(short: RunConfig, change: dict, message: str) -> None:
    from llara_dist.distributed import World
    from llara_dist.training.preflight import open_inputs
    from llara_dist.training.run import open_run

    config = dataclasses.replace(short, resume="auto", **change)
    inputs = open_inputs(config, World())
    with pytest.raises(InputError, match=message):
        open_run(config, inputs, World(), torch.device("cpu"))


def test_two_runs_in_one_process(inputs: Path, tmp_path: Path) -> None:
    """What a notebook does: the process group of the first run is gone when the second begins."""
    code = (
        "import sys; from pathlib import Path; from llara_dist.tuning import train; "
        "from tests.runs import run_config; "
        "[train(run_config(Path(sys.argv[1]), Path(sys.argv[2]) / name, 'zero2', max_steps=2)) for name in 'ab']"
    )
    arguments = [sys.executable, "-c", code, str(inputs), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab")
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


def test_rotation_keeps_the_newest_complete_checkpoints(tmp_path: Path) -> None:
    for step, complete in ((1, True), (2, True), (3, False), (4, True), (9, False)):
        (tmp_path / f"step-{step:08d}").mkdir()
        if complete:
            (tmp_path / f"step-{step:08d}" / "complete.json").touch()
    (tmp_path / ".step-00000004.17.staging").mkdir()
    rotate(tmp_path, tmp_path / "step-00000004", keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]
    rotate(tmp_path, tmp_path / "step-00000004", keep_last=9)
    assert len(list(tmp_path.iterdir())) == 2
    rotate(tmp_path, tmp_path / "step-00000004", keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_base_fingerprint_reads_the_files_that_the_index_names(inputs: Path, tmp_path: Path) -> None:
    import shutil

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
