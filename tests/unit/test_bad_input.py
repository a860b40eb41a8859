"""Bad input to `train`: one clear line, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from llara_dist.cli import main
from llara_dist.config import RunConfig


def train(inputs: Path, out: Path, *options: str) -> None:
    main(
        [
            *("train", "--model.path", str(inputs / "llm"), "--data.shards", str(inputs / "shards")),
            *("--recommender.path", str(inputs / "rec"), "--out", str(out), "--device", "cpu", *options),
        ]
    )


def refused(capsys: pytest.CaptureFixture[str], inputs: Path, out: Path, *options: str) -> str:
    """Run `train`, expect exit code 2 and one line on stderr, and nothing at `out`; return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(inputs, out, *options)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert not out.exists()
    return lines[0]


def test_missing_inputs_are_named(capsys, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert "model.path is not set" in refused(capsys, inputs, out, "--model.path", "")
    assert "/nowhere" in refused(capsys, inputs, out, "--data.shards", "/nowhere")
    assert "/nowhere" in refused(capsys, inputs, out, "--recommender.path", "/nowhere")
    assert "/nowhere" in refused(capsys, inputs, out, "--model.path", "/nowhere/llm")
    assert "/nowhere.yaml" in refused(capsys, inputs, out, "--config", "/nowhere.yaml")
    assert "/nowhere.json: ds_config not found" in refused(capsys, inputs, out, "--deepspeed", "/nowhere.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.bits", "5"), "model.bits"),
        (("--model.bitz", "4"), "model.bitz"),
        (("--lora.rank", "0"), "lora.rank=0: must be at least 1"),
        (("--curriculum.probability", "1.5"), "curriculum.probability=1.5"),
        (("--model.quant_storage", "float16"), "silently corrupts"),
        (("--optimizer.beta1", "2"), "optimizer.beta1=2.0"),
        (("--deepspeed", "/"), "ds_config"),
        (("--model.quant-storage", "bfloat16"), "model.quant_storage=bfloat16"),
        (("--data.max_tokens_per_microbatch", "20"), "max_tokens_per_microbatch is 20"),
    ],
)
def test_bad_options(capsys, inputs: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    assert message in refused(capsys, inputs, tmp_path / "run", *options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_batch_size": 8}, "train_batch_size may not be set"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps may not be set"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, "optimizer may not be set"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler may not be set"),
        ({"bf16": {"enabled": True}}, "bf16.enabled casts LoRA"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "quantise the packed 4-bit bytes again"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype must be fp32"),
        ({"zero_optimization": {"stage": 4}}, "stage=4"),
        ([], "a ds_config is a JSON object"),
        ({"bf16": True}, "bf16 must be an object"),
        ({"zero_optimization": 3}, "zero_optimization must be an object"),
        ({"bfloat16": {"enabled": True}}, "bfloat16 may not be set"),
    ],
)
def test_ds_config_that_fights_ours(capsys, inputs: Path, tmp_path: Path, config: object, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    line = refused(capsys, inputs, tmp_path / "run", "--deepspeed", str(path))
    assert message in line
    assert str(path) in line


def test_model_whose_context_is_too_short(capsys, inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "llm", tmp_path / "llm")
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    line = refused(capsys, inputs, tmp_path / "run", "--model.path", str(tmp_path / "llm"))
    assert "context of 32 tokens is shorter" in line


def test_tokenizer_of_another_model(capsys, inputs: Path, tmp_path: Path) -> None:
    from tests.tiny import write_llama, write_tokenizer

    write_tokenizer(tmp_path / "llm", ["quite other words " * 3, "than those of the catalogue"], 300)
    write_llama(tmp_path / "llm", vocabulary=300)
    line = refused(capsys, inputs, tmp_path / "run", "--model.path", str(tmp_path / "llm"))
    assert "its tokenizer" in line
    assert "build them again" in line


def test_recommender_of_another_data_set(capsys, inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "rec", tmp_path / "rec")
    info = json.loads((tmp_path / "rec" / "recommender.json").read_text())
    (tmp_path / "rec" / "recommender.json").write_text(json.dumps(info | {"dataset_hash": "0" * 64}))
    line = refused(capsys, inputs, tmp_path / "run", "--recommender.path", str(tmp_path / "rec"))
    assert "trained on data set 000000000000" in line


def test_more_ranks_than_samples(capsys, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "9")):
        monkeypatch.setenv(name, value)
    line = refused(capsys, inputs, tmp_path / "run", "--data.global_batch_samples", "8")
    assert "9 ranks for a global batch of 8 samples" in line


def test_debug_on_several_ranks(capsys, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert "--debug runs in one process" in refused(capsys, inputs, tmp_path / "run", "--debug")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "LOCAL_RANK is not set"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "outside the world"),
        ({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "not all integers"),
    ],
)
def test_contradicting_launcher_variables(
    capsys, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert message in refused(capsys, inputs, tmp_path / "run")


def test_a_finished_run_is_not_overwritten(capsys, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        train(inputs, tmp_path / "run")
    assert stop.value.code == 2
    assert "holds a run already" in capsys.readouterr().err


def test_command_line_help_and_unknown_commands(capsys) -> None:
    for arguments, code in ((["--help"], 0), (["nope"], 2), (["shards"], 2), ([], 2)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
    assert "unknown command 'nope'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["shards", "--help"])
    assert stop.value.code == 0
    assert "llara-dist shards verify" in capsys.readouterr().out


def test_misspelt_zero_option(capsys, inputs: Path, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stagee": 3}}))
    with pytest.raises(SystemExit) as stop:
        train(inputs, tmp_path / "run", "--deepspeed", str(path))
    assert stop.value.code == 2
    assert "zero_optimization.stagee" in capsys.readouterr().err


def test_debug_removes_only_what_debug_made(capsys, inputs: Path, tmp_path: Path) -> None:
    real = tmp_path / "run-debug"
    (real / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        train(inputs, tmp_path / "run", "--debug")
    assert stop.value.code == 2
    assert "run-debug" in capsys.readouterr().err
    assert (real / "checkpoints").is_dir()


def test_ds_configs_of_the_checkout_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llara_dist.ds_config import read_ds_config, zero_stage

    monkeypatch.chdir(tmp_path)
    assert zero_stage(read_ds_config(Path("ds_configs/zero2.json"))) == 2


def test_every_command_has_help_with_an_example(capsys) -> None:
    from llara_dist.commands import COMMANDS

    for name, command in COMMANDS.items():
        with pytest.raises(SystemExit) as stop:
            main([*name.split(), "--help"])
        assert stop.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert f"example: {' '.join(command.example.split())}" in shown, name
        assert "--json" in shown
        if command.out:  # what it names is no folder of a run, whose default would be refused
            assert f"{command.out} (required" in shown
            assert str(RunConfig().out) not in shown
    assert os.environ.get("OMP_NUM_THREADS")
