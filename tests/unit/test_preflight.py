"""Preflight: everything that is wrong at once, before a weight is read and before anything is written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from llara_dist.cli import main
from llara_dist.cluster.batch_script import Resources
from llara_dist.cluster.run_settings import check_run
from llara_dist.config import KernelsConfig, LoraConfig, ModelConfig, RunConfig, ValidationConfig
from llara_dist.console import GIB
from llara_dist.distributed import World
from llara_dist.errors import Finding, FindingsError, InputError
from llara_dist.model.llama import read_llama_config
from llara_dist.training.contract import differences
from llara_dist.training.preflight.base_model import check_weight_files
from llara_dist.training.preflight.checklist import Checklist
from llara_dist.training.preflight.examine import examine, open_inputs
from llara_dist.training.preflight.versions import TESTED, check_versions, installed_versions
from tests.runs import ROOT, run_config


def command(name: str, inputs: Path, out: Path, *options: str) -> int:
    """Run a command on the small world in this process; its exit code."""
    places = ("--model.path", str(inputs / "llm"), "--data.shards", str(inputs / "shards"))
    try:
        main([name, *places, "--recommender.path", str(inputs / "rec"), "--out", str(out), "--device", "cpu", *options])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def wrong(tmp_path: Path) -> tuple[str, ...]:
    """Options with four errors and a warning, each of another kind."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 7}, "stepsperprint": 3}))
    return ("--deepspeed", str(path), "--recommender.path", "/nowhere", "--data.max_tokens_per_microbatch", "20")


def test_several_errors_end_in_one_table(capsys, inputs: Path, tmp_path: Path, wrong: tuple[str, ...]) -> None:
    assert command("train", inputs, tmp_path / "run", *wrong) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[-1] == "error: preflight: 4 findings; nothing was read or written"
    assert lines[0].startswith("warning: ")
    assert "did you mean steps_per_print?" in lines[0]
    table = " ".join(captured.err.split())
    for part in ("train_batch_size", "stage=7", "/nowhere", "has 219 tokens", "what to do"):
        assert part in table
    assert all(len(line) <= 80 for line in lines[1:])
    assert captured.out == ""
    assert not (tmp_path / "run").exists()


def test_json_has_every_finding(capsys, inputs: Path, tmp_path: Path, wrong: tuple[str, ...]) -> None:
    assert command("train", inputs, tmp_path / "run", *wrong, "--json") == 2
    findings = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
    assert [finding["severity"] for finding in findings] == ["error"] * 4 + ["warning"]
    assert {"check", "found", "remedy"} < findings[0].keys()


@pytest.mark.parametrize("rank", [0, 1])
def test_what_every_rank_finds_is_said_once(
    capsys, inputs: Path, tmp_path: Path, wrong: tuple[str, ...], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    assert command("train", inputs, tmp_path / "run", *wrong, "--json") == 2
    captured = capsys.readouterr()
    assert ("4 findings" in captured.err) == (rank == 0)
    assert bool(captured.err + captured.out) == (rank == 0)


def test_a_rank_says_what_it_alone_found() -> None:
    checks = Checklist()
    checks.extend([Finding("disk", "full", "empty it"), Finding("memory", "GPU", "a larger one", everywhere=False)])
    with pytest.raises(FindingsError, match="2 findings"):
        checks.raise_errors(0)
    with pytest.raises(FindingsError, match="GPU; a larger one") as error:
        checks.raise_errors(1)
    assert not error.value.everywhere
    everyone = Checklist()
    everyone.extend([Finding("disk", "full", "empty it")])
    with pytest.raises(FindingsError) as error:
        everyone.raise_errors(1)
    assert error.value.everywhere


def test_checks_do_not_hide_each_other() -> None:
    def broken() -> int:
        raise InputError("file: damaged; fetch it again")

    def unreadable() -> int:
        raise PermissionError(13, "Permission denied", "/secret")

    checks = Checklist()
    first = checks.run("first", broken)
    assert checks.run("second", unreadable) is None
    assert checks.run("third", lambda value: value, first) is None
    assert checks.run("fourth", lambda: 4, after=[first]) is None
    assert checks.run("fifth", lambda: 5, passed=str) == 5
    assert [finding.severity for finding in checks.findings] == ["error", "error", "skipped", "skipped", "passed"]
    assert checks.findings[0] == Finding("first", "file: damaged", "fetch it again")
    assert checks.findings[1].line == "/secret: Permission denied"


def test_the_preflight_command_shows_what_passed(capsys, inputs: Path, tmp_path: Path) -> None:
    assert command("preflight", inputs, tmp_path / "run", "--ranks", "2", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    findings = json.loads(lines[-1])["findings"]
    assert {finding["severity"] for finding in findings} == {"passed"}
    checks = [finding["check"] for finding in findings]
    assert len(checks) == len(set(checks))
    assert {"versions", "ds_config", "weight files", "storage dtype", "context", "ranks", "plan", "disk"} < set(checks)
    assert lines[0].startswith(str(tmp_path / "run")[:40])
    assert list(tmp_path.iterdir()) == []


def test_the_preflight_command_fails_as_the_run_would(capsys, inputs: Path, tmp_path: Path) -> None:
    options = ("--ranks", "9", "--data.global_batch_samples", "8", "--validation.every_steps", "2")
    assert command("preflight", inputs, tmp_path / "run", *options) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: 9 ranks for a global batch of 8 samples")
    assert len(captured.err.splitlines()) == 1
    assert "passed" in captured.out


@pytest.mark.parametrize("name", ["preflight", "train"])
def test_kernels_that_the_stage_or_the_device_rule_out(capsys, inputs: Path, tmp_path: Path, name: str) -> None:
    asked = ("attention=flash2", "projector=triton", "lora=fused", "compile=true", "layers=torch")
    options = [f"--kernels.{field}" for field in asked] + ["--deepspeed", str(ROOT / "ds_configs" / "zero3.json")]
    assert command(name, inputs, tmp_path / "run", *options, "--data.max_tokens_per_microbatch", "20", "--json") == 2
    captured = capsys.readouterr()
    findings = json.loads(captured.out.splitlines()[-1])["findings"]
    found = [(f["check"], f["found"].split(":")[0]) for f in findings if f["check"].startswith("kernels")]
    assert found == [("kernels here", "kernels.attention=flash2")] + [
        ("kernels", f"kernels.{field}") for field in asked[1:4]
    ]
    assert "token budget" in {f["check"] for f in findings if f["severity"] == "error"}
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_cpp_compiler")
@pytest.mark.parametrize("name", ["preflight", "train"])
def test_a_compiler_is_asked_for_before_anything_is_loaded(capsys, inputs: Path, tmp_path: Path, name: str) -> None:
    assert command(name, inputs, tmp_path / "run", "--kernels.compile", "true") == 2
    assert capsys.readouterr().err == (
        "error: kernels.compile=true: torch.compile finds no C++ compiler; "
        "install g++, name another in CXX, or use false\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_job_is_checked_for_what_its_stage_rules_out_and_not_for_this_machine(inputs: Path, tmp_path: Path) -> None:
    resources = Resources(gpus_per_node=2)
    kernels = KernelsConfig(attention="flash2", projector="triton", layers="liger")
    config = dataclasses.replace(run_config(inputs, tmp_path / "run"), kernels=kernels)
    check_run(config, resources)
    with pytest.raises(FindingsError, match=r"^kernels.projector=triton: ZeRO-3 partitions"):
        check_run(dataclasses.replace(config, deepspeed=ROOT / "ds_configs" / "zero3.json"), resources)


def test_missing_inputs_are_named_together(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["preflight", "--device", "cpu", "--json"])
    findings = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
    found = [finding["found"] for finding in findings if finding["severity"] == "error"]
    assert found == [f"{name} is not set" for name in ("model.path", "data.shards", "recommender.path")]


@pytest.fixture
def llm(inputs: Path, tmp_path: Path) -> Path:
    """A copy of the small model's folder, to be damaged."""
    return Path(shutil.copytree(inputs / "llm", tmp_path / "llm"))


def weights(llm: Path) -> str:
    model = ModelConfig(path=str(llm))
    return check_weight_files(model, read_llama_config(model))


def test_a_download_that_was_cut_short(llm: Path) -> None:
    assert weights(llm).startswith("1 whole file: 0.1 M F32")
    file = llm / "model.safetensors"
    for length in (file.stat().st_size - 1, 100, 0):
        os.truncate(file, length)
        with pytest.raises(InputError, match=r"model.safetensors: not a whole safetensors file"):
            weights(llm)
    file.unlink()
    with pytest.raises(InputError, match=r"has no model.safetensors"):
        weights(llm)


def test_an_index_that_names_what_is_not_there(llm: Path) -> None:
    index = {"weight_map": {"model.embed_tokens.weight": "model.safetensors", "surplus": "model.safetensors"}}
    (llm / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="surplus, it does not"):
        weights(llm)


def test_weights_of_an_odd_dtype(llm: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"model.embed_tokens.weight": torch.zeros(4, 4, dtype=torch.int8)}, llm / "model.safetensors")
    with pytest.raises(InputError, match="weights of dtype I8"):
        weights(llm)


def test_a_hub_id_whose_weights_are_not_here_while_the_hub_is_off(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    repository = tmp_path / "hub" / "models--some--llama"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copy(inputs / "llm" / "config.json", snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = ModelConfig(path="some/llama")
    with pytest.raises(InputError, match=r"model.safetensors is not in this node's hub cache and HF_HUB_OFFLINE"):
        check_weight_files(model, read_llama_config(model))


def test_versions_that_are_too_old_missing_or_untested() -> None:
    tested = {name: newest for name, (_, newest) in TESTED.items()} | {"deepspeed": "0.19.8"}
    assert check_versions(tested, on_gpu=True) == []
    assert check_versions(tested | {"torch": "2.13.1+cu130", "triton": None}, on_gpu=False) == []
    found = check_versions(
        tested | {"deepspeed": "0.19.2", "torch": "2.14.0", "peft": None, "python": "3.10.9", "triton": "3.5"},
        on_gpu=True,
    )
    assert [(finding.severity, finding.found.split(" ")[0]) for finding in found] == [
        ("error", "python"),
        ("warning", "torch"),
        ("error", "deepspeed"),
        ("error", "peft"),
        ("error", "triton"),
    ]
    assert "activation checkpointing under ZeRO-3" in found[2].found
    assert check_versions(installed_versions(), on_gpu=False) == []


def test_the_oldest_versions_are_those_that_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {item.name: item.specifier for item in map(Requirement, project["dependencies"])}
    asked["python"] = Requirement(f"python{project['requires-python']}").specifier
    for name in TESTED.keys() & asked.keys():
        (oldest,) = (part.version for part in asked[name] if part.operator == ">=")
        assert Version(oldest) == Version(TESTED[name][0]), name
    assert TESTED.keys() - asked.keys() == {"triton"}  # comes with torch


def test_all_differences_between_a_checkpoint_and_the_run() -> None:
    saved = {"seed": 0, "plan": "a" * 64, "lora": {"rank": 8, "alpha": 32.0}, "gone": 1}
    now = {"seed": 1, "plan": "b" * 64, "lora": {"rank": 4, "alpha": 32.0}, "new": True}
    assert sorted(differences(saved, now)) == [
        "gone was 1, now None",
        "lora.rank was 8, now 4",
        "new was None, now True",
        "plan was aaaaaaaaaaaa, now bbbbbbbbbbbb",
        "seed was 0, now 1",
    ]
    assert differences(saved, saved) == []


def test_a_run_that_does_not_fit_in_memory(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(inputs, tmp_path / "run")
    assert open_inputs(config, World()).total_steps > 0
    monkeypatch.setattr("llara_dist.training.preflight.resources.free_host_bytes", lambda: GIB // 4)
    with pytest.raises(FindingsError, match=r"memory of 1 ranks: about [\d.]+ GiB needed, 0.2 GiB free"):
        open_inputs(config, World())


def test_a_lora_target_that_no_llama_has_is_said_once(inputs: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(run_config(inputs, tmp_path / "run"), lora=LoraConfig(targets=("q_proj", "gate")))
    with pytest.raises(FindingsError, match="gate"):
        open_inputs(config, World())


def test_a_run_that_validates_needs_a_validation_split(inputs: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(inputs / "shards", tmp_path / "shards"))
    shutil.rmtree(shards / "val")
    config = run_config(inputs, tmp_path / "run", shards=str(shards))
    assert open_inputs(config, World())
    validated = dataclasses.replace(config, validation=ValidationConfig(every_steps=2))
    with pytest.raises(FindingsError, match="val"):
        open_inputs(validated, World())


def test_fewer_lanes_than_nodes_is_a_warning(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llara_dist.training.preflight.examine.is_remote", lambda shards: True)
    config = run_config(inputs, tmp_path / "run", lanes=2)
    checks, found = examine(config, World(size=6), local_ranks=2)
    (warning,) = checks.of("warning")
    assert "data.lanes=2 for 3 nodes" in warning.found
    assert found is not None
    checks, _ = examine(config, World(size=4), local_ranks=2)
    assert checks.of("warning") == []


def test_a_default_run_needs_its_inputs_only(capsys, inputs: Path, tmp_path: Path) -> None:
    checks, found = examine(dataclasses.replace(RunConfig(), out=tmp_path / "run", device="cpu"), World(), 1)
    assert found is None
    assert {finding.check for finding in checks.of("error")} == {"inputs"}
