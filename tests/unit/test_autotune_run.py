"""`llara-dist tune` on a whole small run, on the CPU: what it measures is the run's, what it writes `train` takes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llara_dist.autotune import command, search
from llara_dist.autotune.bench import DoesNotFitError
from llara_dist.autotune.measure import ModelBench
from llara_dist.autotune.questions import questions_for, start_of
from llara_dist.cli import main
from llara_dist.config import LoraConfig, RunConfig, to_dict
from llara_dist.distributed import World
from llara_dist.errors import InputError
from llara_dist.model.kernels import chooser
from llara_dist.training.preflight.examine import open_inputs
from tests.runs import run_config

CPU = torch.device("cpu")


def write_run(path: Path, config: RunConfig) -> Path:
    path.write_text(yaml.safe_dump({name: value for name, value in to_dict(config).items() if name != "out"}))
    return path


def test_what_tune_writes_is_a_further_config_of_the_run(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(command, "WINDOW_S", 0.02)
    monkeypatch.setattr(search, "COMPILE_S", 1e9)
    monkeypatch.setattr("llara_dist.model.kernels._has_no_cpp_compiler", lambda: False)  # nothing is compiled
    config = run_config(inputs, tmp_path / "unused", max_steps=1, global_batch_samples=5)
    run, tuned, out = write_run(tmp_path / "run.yaml", config), tmp_path / "tuned.yaml", tmp_path / "run"
    main(["tune", "--config", str(run), "--out", str(tuned), "--seconds", "600", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["untried"] == ["kernels.compile=true"]
    assert result["trials"][0]["what"] == "start"
    timed = {trial["what"] for trial in result["trials"] if trial["tokens_per_s"]}
    assert timed >= {"token budget", "kernels.last_layer=all"}
    assert yaml.safe_load(tuned.read_text()) == result["settings"]
    comments = [line for line in tuned.read_text().splitlines() if line.startswith("#")]
    assert any(f"torch: {torch.__version__}" in line for line in comments)
    assert any("kernels.compile=true | not tried" in line for line in comments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml", "tuned.yaml"]  # nothing else is left

    main(["train", "--config", str(run), "--config", str(tuned), "--out", str(out)])
    trained, expected = json.loads((out / "config.json").read_text()), to_dict(config)
    assert trained["data"] == {**expected["data"], **result["settings"]["data"]}
    assert trained["kernels"] == {**expected["kernels"], **result["settings"].get("kernels", {})}
    assert trained["lora"] == expected["lora"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1


def test_options_that_make_no_sense_are_refused_at_once(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(inputs, tmp_path / "tuned.yaml")
    for changes, given, said in [
        ({"out": tmp_path / "run"}, {}, "must name the file to write, FILE.yaml"),
        ({}, {"ranks": 0}, "--ranks 0"),
        ({}, {"ranks": 8}, "8 ranks for a global batch of 7 samples"),
        ({}, {"seconds": 0.5}, "--seconds 0.5"),
        ({}, {"seconds": 1.001}, "not enough to load the model"),
    ]:
        with pytest.raises(InputError, match=said):
            command.tune(dataclasses.replace(config, **changes), **given)
    config.out.write_text("mine")
    with pytest.raises(InputError, match=r"exists already.*--overwrite"):
        command.tune(config)
    assert config.out.read_text() == "mine"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match="several processes were started"):
        command.tune(config, overwrite=True)


def test_what_had_to_be_changed_to_fit_is_written_even_where_nothing_else_was_tried(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(inputs, tmp_path / "tuned.yaml")
    recomputing = dataclasses.replace(config.model, activation_checkpointing=True)
    monkeypatch.setattr(command, "WINDOW_S", 0.0)
    monkeypatch.setattr(command, "fit_device", lambda config: dataclasses.replace(config, model=recomputing))
    monkeypatch.setattr(command, "questions_for", lambda *_: ([], []))
    result = command.tune(config, seconds=600)
    assert result["settings"]["model"] == {"activation_checkpointing": True}


def test_ctrl_c_writes_the_best_so_far(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config = run_config(inputs, tmp_path / "tuned.yaml")
    monkeypatch.setattr(command, "WINDOW_S", 0.0)
    monkeypatch.setattr(ModelBench, "difference", interrupt)
    with pytest.raises(KeyboardInterrupt):
        command.tune(config, seconds=600)
    assert f"nothing was measured yet: {config.out} is not written" in capsys.readouterr().err
    assert not config.out.exists()
    monkeypatch.undo()
    monkeypatch.setattr(command, "WINDOW_S", 0.0)
    monkeypatch.setattr(search, "_try", interrupt)
    result = command.tune(config, seconds=600)
    assert result["trials"][0]["what"] == "start"
    assert "kernels.last_layer=all" in result["untried"]
    assert yaml.safe_load(config.out.read_text()) == result["settings"]
    assert "# interrupted: this is the best until then\n" in config.out.read_text()


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def bench(inputs: Path, tmp_path: Path) -> ModelBench:
    config = dataclasses.replace(run_config(inputs, tmp_path / "run"), lora=LoraConfig(dropout=0.1))
    return ModelBench(config, open_inputs(config, World()), CPU, ranks=2, window_s=0.0)


def test_a_wrong_adapter_is_seen_though_adapters_start_at_zero(
    bench: ModelBench, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llara_dist.model.kernels._has_no_cpp_compiler", lambda: False)  # nothing is compiled
    config = run_config(inputs, Path("unused"))
    choose = chooser(config.model, CPU, 0)
    start = start_of(config, choose)
    questions, _ = questions_for(start, choose)
    assert questions[-1].name == "compile"
    assert bench.most_tokens == 4 * bench.longest  # two ranks share seven samples
    other = start.having("last_layer", "all")
    for setting in (start, other):
        bench.prepare(setting)
        assert bench.difference(setting) == ""  # dropout, which draws anew each time, is off
    layers: Any = bench.model(other).modules()
    adapter = next(layer for layer in layers if isinstance(getattr(layer, "scaling", None), dict))
    adapter.scaling["default"] *= 1.5
    assert bench.difference(other) != ""


def test_after_memory_ran_out_the_same_model_goes_on(
    bench: ModelBench, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(inputs, Path("unused"))
    start = start_of(config, chooser(config.model, CPU, 0))
    bench.prepare(start)
    assert bench.speed(start) > 0
    model = bench.model(start)
    projector = next(iter(model.projector_parameters().values()))
    forward, calls = model.forward, iter([True, False])

    def second_call_fails(row: Any) -> torch.Tensor:
        if next(calls):
            return forward(row)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(bench._windows, "_counts", {start: 2})
    monkeypatch.setattr(model, "forward", second_call_fails)
    with pytest.raises(DoesNotFitError):
        bench.speed(start)
    assert projector.grad is None  # nor is anything left of the first
    monkeypatch.setattr(model, "forward", forward)
    assert bench.speed(start) > 0
