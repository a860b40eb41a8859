"""Bytes that are estimated against bytes that are there: packed weights and what autograd saves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest

from llara_dist.config import DataConfig, KernelsConfig, LoraConfig, ModelConfig, RunConfig
from llara_dist.cost.activations import activation_bytes
from llara_dist.cost.architecture import PRESETS
from llara_dist.cost.memory import estimate_run_memory, frozen_bytes, run_memory, trained_bytes
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import SampleSizes, Work
from llara_dist.cost.zero import ZeroSettings
from llara_dist.ds_config import read_ds_config
from tests.models import build, packed_row, saved_bytes, tuned, write_shape
from tests.runs import ROOT

GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shape")
    write_shape(path)
    return path


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        ({"bits": 4}, LoraConfig()),
        ({"bits": 4}, LoraConfig(dropout=0.0)),
        ({"bits": 4}, LoraConfig(dropout=0.0, rank=16, targets=("q_proj", "v_proj", "down_proj"))),
        ({"bits": 4, "compute_dtype": "bfloat16"}, LoraConfig()),
        ({"bits": 4, "compute_dtype": "bfloat16"}, LoraConfig(dropout=0.0)),
        ({"bits": 4, "activation_checkpointing": True}, LoraConfig()),
        ({"bits": 4, "compute_dtype": "bfloat16", "activation_checkpointing": True}, LoraConfig()),
        ({"bits": 4, "activation_checkpointing": 1}, LoraConfig()),
        ({"bits": 4, "compute_dtype": "bfloat16", "activation_checkpointing": 2}, LoraConfig(dropout=0.0)),
        ({"bits": 4, "attention": "sdpa"}, LoraConfig()),
        ({"bits": 4, "attention": "eager"}, LoraConfig()),
        ({"bits": 32}, LoraConfig()),
        ({"bits": 32, "compute_dtype": "bfloat16"}, LoraConfig(dropout=0.0)),
    ],
    ids=lambda value: ",".join(str(v) for v in value.values()) if isinstance(value, dict) else f"p={value.dropout}",
)
@pytest.mark.parametrize("adapters", ["fused", "peft"])
def test_saved_activations_are_those_that_autograd_saves(
    folder: Path, model: dict[str, Any], lora: LoraConfig, adapters: Literal["fused", "peft"]
) -> None:
    kernels = KernelsConfig(lora=adapters)
    built, batch = build(folder, model, lora, kernels), packed_row()
    expected = activation_bytes(tuned(folder, model, lora, kernels), Work.of([batch]), "cpu").total
    assert expected == pytest.approx(saved_bytes(built, batch), rel=0.01)
    if built.kernels.last_layer == "answers":
        built.kernels = dataclasses.replace(built.kernels, last_layer="all")
        whole = dataclasses.replace(tuned(folder, model, lora, kernels), last_layer="all")
        found = activation_bytes(whole, Work.of([batch]), "cpu").total
        assert found > expected or built.llm.is_gradient_checkpointing
        assert found == pytest.approx(saved_bytes(built, batch), rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_bytes_are_those_of_the_loaded_model(folder: Path, dtype: str) -> None:
    settings = {"bits": 4, "compute_dtype": dtype}
    built = build(folder, settings, LoraConfig())
    packed = constants = others = 0
    for parameter in built.llm.parameters():
        if parameter.requires_grad:
            continue
        state = getattr(parameter, "quant_state", None)
        if state is None:
            others += parameter.nbytes
            continue
        packed += parameter.nbytes
        tensors = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        constants += sum(tensor.nbytes for tensor in tensors)
    expected = frozen_bytes(tuned(folder, settings, LoraConfig()), ZeroSettings(), 1)
    assert expected == {"packed weights": packed, "quantisation constants": constants, "unquantised weights": others}


def test_a_7b_in_nf4_is_as_large_as_it_was_measured() -> None:
    found = frozen_bytes(TunedModel(PRESETS["llama-2-7b"]), ZeroSettings(), 1)
    assert found["packed weights"] / GB == pytest.approx(3.24, abs=0.005)
    assert found["quantisation constants"] / GB == pytest.approx(0.1, abs=0.005)


def test_partitions_of_all_ranks_hold_the_model_once() -> None:
    model = TunedModel(PRESETS["llama-2-7b"])
    zero3 = ZeroSettings(stage=3)
    whole, part = frozen_bytes(model, ZeroSettings(), 1), frozen_bytes(model, zero3, 8)
    assert 8 * part["packed weights"] == whole["packed weights"]
    assert part["quantisation constants"] == whole["quantisation constants"]
    norms = 2 * model.architecture.norm_weights
    assert 8 * (part["unquantised weights"] - norms) == whole["unquantised weights"]


@pytest.mark.parametrize("world_size", [1, 8])
def test_stages_need_less_in_order(world_size: int) -> None:
    model, small = TunedModel(PRESETS["llama-2-7b"]), 1000
    held = []
    for stage in (0, 1, 2, 3):
        zero = ZeroSettings(stage=stage, reduce_bucket=small, persistence=0, max_live=small, max_reuse_distance=small)
        kinds = {**frozen_bytes(model, zero, world_size), **trained_bytes(model, zero, world_size)[0]}
        held.append(sum(kinds.values()))
    if world_size > 1:
        assert held == sorted(held, reverse=True)
    device, host = trained_bytes(model, ZeroSettings(stage=2, offload_optimizer=True), world_size)
    assert device["moments"] == 0
    assert host == 24 * -(-model.trainable // world_size)


def test_recomputation_and_a_smaller_budget_need_less() -> None:
    model, sizes = TunedModel(PRESETS["llama-2-7b"]), SampleSizes()
    full = run_memory(model, sizes.row(8192, 1682), ZeroSettings(stage=1), 8)
    half = run_memory(model, sizes.row(4096, 1682), ZeroSettings(stage=1), 8)
    again = run_memory(dataclasses.replace(model, recompute=True), sizes.row(8192, 1682), ZeroSettings(stage=1), 8)
    assert half.device["activations"] == pytest.approx(full.device["activations"] / 2, rel=0.01)
    assert again.device["activations"] < 0.06 * full.device["activations"]
    assert again.device_bytes < half.device_bytes < full.device_bytes


def test_a_budget_that_no_rank_fills_needs_no_memory(folder: Path) -> None:
    from transformers import LlamaConfig

    llama, ds_config = LlamaConfig.from_pretrained(folder), read_ds_config(ROOT / "ds_configs" / "zero1.json")

    def activations(ranks: int, budget: int) -> int:
        run = RunConfig(
            model=ModelConfig(path=str(folder)),
            data=DataConfig(global_batch_samples=8, max_tokens_per_microbatch=budget),
        )
        found = estimate_run_memory(run, llama, ds_config, ranks, (40, 16), SampleSizes(), "cuda", bfloat16=True)
        return found.device["activations"]

    longest = SampleSizes().longest
    assert activations(4, 65536) == activations(4, 2 * longest) > activations(8, 65536) == activations(8, longest)


def test_a_run_is_estimated_before_any_weight_is_read(folder: Path) -> None:
    from transformers import LlamaConfig

    found = {}
    for stage in ("zero1", "zero3"):
        run = RunConfig(model=ModelConfig(path=str(folder)))
        ds_config = read_ds_config(ROOT / "ds_configs" / f"{stage}.json")
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        llama = LlamaConfig.from_pretrained(folder)
        found[stage] = estimate_run_memory(
            run, llama, ds_config, 2, item_table=(40, 16), samples=SampleSizes(), device_type="cuda", bfloat16=True
        )
        assert found[stage].device_bytes >= sum(found[stage].device.values()) > 0
    assert "model before partitioning" in found["zero3"].host
    assert found["zero3"].device["packed weights"] < found["zero1"].device["packed weights"]
    # PEFT's adapters under stage 3 keep masks and masked inputs, the fused ones neither.
    assert found["zero3"].device["activations"] > 1.2 * found["zero1"].device["activations"]
