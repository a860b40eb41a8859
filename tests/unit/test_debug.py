"""`--debug` on one GPU: what is changed so that a real model fits, and whose folder is cleared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig

from llara_dist.cli import main
from llara_dist.config import DataConfig, ModelConfig, RunConfig, TrackingConfig
from llara_dist.console import GIB
from llara_dist.cost.architecture import PRESETS, Architecture
from llara_dist.cost.memory import estimate_run_memory
from llara_dist.cost.recommend import MARGIN
from llara_dist.cost.work import SampleSizes
from llara_dist.distributed import Job, World
from llara_dist.ds_config import read_ds_config
from llara_dist.errors import InputError
from llara_dist.supervision.run_lock import RunLock
from llara_dist.training import fit_device as fitting
from llara_dist.training.debug import MARK, check_folder, clear, shrink
from llara_dist.training.fit_device import DEBUG_BYTES, first_that_fits, fit_device, variants
from tests.runs import ROOT, run_config

SAMPLES = SampleSizes()
LAYERS = 32
LLAMA_2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=LAYERS, num_attention_heads=32, vocab_size=32000
)


def movielens(deepspeed: str) -> RunConfig:
    """What `--debug` makes of launch/configs/movielens.yaml."""
    values = yaml.safe_load((ROOT / "launch" / "configs" / "movielens.yaml").read_text())
    config = RunConfig(data=DataConfig(**values["data"]), deepspeed=Path(deepspeed), out=Path("runs/movielens"))
    return shrink(config, World())


def predict(config: RunConfig) -> int:
    ds_config = read_ds_config(config.deepspeed)
    return estimate_run_memory(config, LLAMA_2_7B, ds_config, 1, (1682, 64), SAMPLES, "cuda", True).device_bytes


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
def test_a_7b_model_on_movielens_fits_16_gib(stage: str) -> None:
    assert Architecture.of(LLAMA_2_7B) == PRESETS["llama-2-7b"]
    config = movielens(f"ds_configs/{stage}.json")
    room = int((1 - MARGIN) * DEBUG_BYTES)
    assert predict(config) > 16 * GIB  # else there would be nothing to show
    chosen = first_that_fits(variants(config, SAMPLES.longest, LAYERS), predict, room)
    assert predict(chosen) <= room < 16 * GIB
    # Nothing that changes a number is changed, and no more layers are recomputed than must be.
    layers = chosen.model.activation_checkpointing
    assert chosen == dataclasses.replace(config, model=ModelConfig(activation_checkpointing=layers))
    assert 0 < layers < LAYERS
    assert predict(dataclasses.replace(config, model=ModelConfig(activation_checkpointing=layers - 1))) > room


def test_less_memory_takes_smaller_microbatches_too() -> None:
    config = movielens("ds_configs/zero1.json")
    chosen = first_that_fits(variants(config, SAMPLES.longest, LAYERS), predict, predict(config) // 4)
    assert chosen.model.activation_checkpointing is True
    assert SAMPLES.longest <= chosen.data.max_tokens_per_microbatch < config.data.max_tokens_per_microbatch
    least = first_that_fits(variants(config, SAMPLES.longest, LAYERS), predict, 0)
    assert least.data.max_tokens_per_microbatch == SAMPLES.longest
    budgets = [tried.data.max_tokens_per_microbatch for tried in variants(config, SAMPLES.longest, LAYERS)]
    assert budgets == sorted(budgets, reverse=True)
    assert {tried.data.max_tokens_per_microbatch for tried in variants(config, budgets[0], LAYERS)} == {budgets[0]}


def test_on_the_cpu_nothing_is_changed(inputs: Path, tmp_path: Path) -> None:
    config = run_config(inputs, tmp_path / "run")
    assert fit_device(config, DEBUG_BYTES) is config


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with 1.7 GiB free: less than this model's micro-batches of 600 tokens are predicted to need with it."""
    monkeypatch.setattr(fitting, "pick_device", lambda wanted, world: torch.device("cuda"))
    monkeypatch.setattr(fitting, "compute_dtype", lambda model, device: torch.bfloat16)
    monkeypatch.setattr(fitting, "free_device_bytes", lambda device: int(1.7 * GIB))


@pytest.mark.usefixtures("a_gpu")
def test_what_is_changed_is_said(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(inputs, tmp_path / "run", max_tokens_per_microbatch=1 << 20, global_batch_samples=4096)
    chosen = fit_device(config)
    assert chosen.model.activation_checkpointing
    assert chosen.data.max_tokens_per_microbatch < 1 << 20
    said = capsys.readouterr().out
    assert "model.activation_checkpointing was False, now True" in said
    assert f"data.max_tokens_per_microbatch was {1 << 20}, now {chosen.data.max_tokens_per_microbatch}" in said
    assert f"{(1 - MARGIN) * 1.7:.1f} may be used" in said
    kept = fit_device(config, keep_budget=True)
    assert kept.data.max_tokens_per_microbatch == 1 << 20
    assert kept.model.activation_checkpointing


@pytest.mark.usefixtures("a_gpu")
def test_missing_inputs_are_left_to_preflight(inputs: Path, tmp_path: Path) -> None:
    config = run_config(inputs, tmp_path / "run", shards=str(tmp_path / "nowhere"))
    assert fit_device(config, DEBUG_BYTES) is config


def test_clearing_keeps_the_lock_and_the_signs_of_life(tmp_path: Path) -> None:
    out = tmp_path / "run-debug"
    for name in (MARK, "ranks", "checkpoints"):
        (out / name).mkdir(parents=True)
    for name in ("lock-000001.json", "ranks/rank-0.json", "metrics.jsonl", f"{MARK}/first_batch.safetensors"):
        (out / name).touch()
    clear(out)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == [
        "lock-000001.json",
        "ranks",
        "ranks/rank-0.json",
    ]
    check_folder(out)  # killed here, the next debug run takes the folder over
    (out / "thesis.tex").touch()
    with pytest.raises(InputError, match="run-debug: exists and was not made by --debug"):
        clear(out)
    assert (out / "thesis.tex").exists()


def test_a_second_debug_run_leaves_the_first_ones_folder_alone(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run-debug"
    (out / MARK).mkdir(parents=True)
    (out / MARK / "first_batch.safetensors").touch()
    arguments = ["train", "--debug", "--model.path", str(inputs / "llm"), "--data.shards", str(inputs / "shards")]
    arguments += ["--recommender.path", str(inputs / "rec"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    with RunLock(out, Job(), heartbeat_s=0.1), pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "works in this folder" in capsys.readouterr().err
    assert (out / MARK / "first_batch.safetensors").exists()


def test_a_teams_trackers_do_not_see_debug_runs() -> None:
    tracked = RunConfig(tracking=TrackingConfig(wandb="team", mlflow="team", name="seed-1"))
    assert shrink(tracked, World()).tracking == TrackingConfig()
