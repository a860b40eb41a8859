"""Activation checkpointing of some layers: the same gradients, as many layers as memory asks for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from llara_dist import distributed
from llara_dist.config import KernelsConfig, LoraConfig, ModelConfig, RunConfig
from llara_dist.console import GIB
from llara_dist.cost.architecture import PRESETS
from llara_dist.cost.memory import estimate_run_memory, run_memory
from llara_dist.cost.recommend import MARGIN, fewest_recomputed
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import SampleSizes
from llara_dist.cost.zero import ZeroSettings
from llara_dist.distributed import World
from llara_dist.errors import InputError
from llara_dist.model import kernels as kernels_module
from llara_dist.model.llama import read_llama_config
from llara_dist.training import fit_device as fitting
from llara_dist.training.engine import seed_dropout
from llara_dist.training.fit_device import choose_recomputed
from llara_dist.training.preflight.examine import open_inputs
from tests.models import build, packed_row, write_shape
from tests.runs import run_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shape")
    write_shape(path)
    return path


def gradients(folder: Path, recompute: bool | int) -> dict[str, torch.Tensor]:
    model = build(folder, {"bits": 4, "activation_checkpointing": recompute}, LoraConfig(dropout=0.3))
    # B starts at zero: A's gradients would be zero whatever dropout draws.
    for name, parameter in model.lora_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    marked = [layer.gradient_checkpointing for layer in model.llm.base_model.model.model.layers]
    count = len(marked) if recompute is True else int(recompute)
    assert marked == [True] * count + [False] * (len(marked) - count)
    seed_dropout(0, 0, 0, 0)
    model(packed_row()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("recompute", [1, 2, True])
def test_recomputing_some_layers_changes_no_gradient_under_dropout(folder: Path, recompute: bool | int) -> None:
    expected, found = gradients(folder, False), gradients(folder, recompute)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
        assert bool(gradient.any()), name


def test_more_layers_than_there_are_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"model.activation_checkpointing=4: the model has 3 layers"):
        build(folder, {"bits": 32, "activation_checkpointing": 4}, LoraConfig())
    with pytest.raises(InputError, match=r"model.activation_checkpointing=-1: must be"):
        ModelConfig(activation_checkpointing=-1)


def chosen(config: RunConfig, device: str = "cpu") -> int:
    world = World()
    inputs = open_inputs(config, world)
    weight = inputs.item_table.weight
    found = choose_recomputed(config, inputs.shards, weight, inputs.ds_config, world, torch.device(device))
    assert dataclasses.replace(found, model=config.model) == config
    count = found.model.activation_checkpointing
    assert isinstance(count, int)
    return count


def test_auto_recomputes_as_few_layers_as_memory_asks_for(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(inputs, tmp_path / "run", max_tokens_per_microbatch=1 << 20, global_batch_samples=4096)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, activation_checkpointing="auto"))
    assert chosen(config) == 0
    assert "this is a CPU" in capsys.readouterr().out

    monkeypatch.setattr(fitting, "free_device_bytes", lambda device: 64 * GIB)
    monkeypatch.setattr(fitting, "compute_dtype", lambda model, device: torch.bfloat16)
    counts = []
    for target in (100.0, 0.5):
        held = dataclasses.replace(config, model=dataclasses.replace(config.model, memory_target_gib=target))
        counts.append(chosen(held))
        printed = capsys.readouterr()
        said = printed.out + printed.err
        assert f"to stay under {target:.1f} GiB" in said
    layers = read_llama_config(config.model).num_hidden_layers
    assert counts == [0, layers]
    assert "with every layer recomputed" in said

    assert chosen(config) == 0
    assert f"to stay under {(1 - MARGIN) * 64:.1f} GiB" in capsys.readouterr().out
    # The rank with the least room decides, here another one.
    monkeypatch.setattr(distributed, "gather_objects", lambda room: [room, GIB // 2])
    assert chosen(config) == layers
    assert "to stay under 0.5 GiB" in capsys.readouterr().out


def test_auto_counts_the_layers_that_will_compute(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger's keep less: with memory between what the two need, one of them recomputes and the other does not."""
    config = run_config(inputs, tmp_path / "run", max_tokens_per_microbatch=1 << 20, global_batch_samples=4096)
    needs: dict[str, int] = {}
    for layers in ("torch", "liger"):
        opened = open_inputs(config, World())
        held = dataclasses.replace(config, kernels=KernelsConfig(layers=layers))
        sizes = SampleSizes.of(opened.shards.info, opened.shards.longest)
        items, width = opened.item_table.weight.shape
        llama = read_llama_config(config.model)
        memory = estimate_run_memory(held, llama, opened.ds_config, 1, (items, width), sizes, "cuda", True)
        needs[layers] = memory.device_bytes
    assert needs["liger"] < needs["torch"]

    target = sum(needs.values()) / 2 / GIB
    model = dataclasses.replace(config.model, activation_checkpointing="auto", memory_target_gib=target)
    config = dataclasses.replace(config, model=model)
    monkeypatch.setattr(fitting, "free_device_bytes", lambda device: 64 * GIB)
    monkeypatch.setattr(fitting, "compute_dtype", lambda model, device: torch.bfloat16)
    for installed, recomputes in ((True, False), (False, True)):
        monkeypatch.setattr(kernels_module, "find_spec", lambda name, installed=installed: installed or None)
        monkeypatch.setattr(kernels_module, "_liger_lacks", lambda: "")
        monkeypatch.setattr(kernels_module, "_triton_lacks", lambda: "")
        assert bool(chosen(config, "cuda")) == recomputes
        assert chosen(dataclasses.replace(config, kernels=KernelsConfig(layers="torch")), "cuda") > 0


def test_the_fewest_layers_that_fit_are_taken() -> None:
    """As many layers as make a 7B model fit, and with one less it would not."""
    model, row = TunedModel(PRESETS["llama-2-7b"]), SampleSizes().row(8192, 1682)

    def need(count: int) -> int:
        return run_memory(dataclasses.replace(model, recompute=count), row, ZeroSettings(), 1).device_bytes

    count = fewest_recomputed(32, need, 36 * GIB)
    assert count is not None
    assert 0 < count < 32
    assert need(count) <= 36 * GIB < need(count - 1)
    assert fewest_recomputed(32, need, 1 * GIB) is None
