"""The FLOP count of a step against torch's own counter over a real forward and backward pass."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llara_dist.config import KernelsConfig, LoraConfig
from llara_dist.cost.architecture import PRESETS, Architecture
from llara_dist.cost.flops import step_flops
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import SampleSizes, Work
from tests.models import ITEM_DIM, ITEMS, SHAPE, build, packed_row, write_shape


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shape")
    write_shape(path)
    return path


def tuned(**changes: Any) -> TunedModel:
    architecture = Architecture(
        hidden=SHAPE["hidden_size"],
        intermediate=SHAPE["intermediate_size"],
        layers=SHAPE["num_hidden_layers"],
        heads=SHAPE["num_attention_heads"],
        kv_heads=SHAPE["num_key_value_heads"],
        head_dim=SHAPE["hidden_size"] // SHAPE["num_attention_heads"],
        vocabulary=SHAPE["vocab_size"],
    )
    settings = {"bits": 32, "bfloat16": False, "projector_hidden": SHAPE["hidden_size"], **changes}
    return TunedModel(architecture, ITEM_DIM, ITEMS, **settings)


@pytest.mark.parametrize("recompute", [False, 1, True], ids=["kept", "one recomputed", "recomputed"])
@pytest.mark.parametrize("lora", ["fused", "peft"])
def test_matrix_products_are_counted_exactly(
    folder: Path, recompute: bool | int, lora: Literal["fused", "peft"]
) -> None:
    """To the last FLOP, with eager attention: the counter does not know the fused one on the CPU."""
    settings = {"bits": 32, "attention": "eager", "activation_checkpointing": recompute}
    model = build(folder, settings, LoraConfig(), KernelsConfig(lora=lora))
    batch = packed_row()
    with FlopCounterMode(display=False) as counter:
        model(batch).backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    expected = step_flops(tuned(attention="eager", recompute=recompute, lora=lora), Work.of([batch]))
    attention = sum(count for op, count in counts.items() if op in (torch.ops.aten.bmm, torch.ops.aten.baddbmm))
    assert products + attention == expected.hardware
    # Eager attention multiplies whole T × T blocks.
    layers = SHAPE["num_hidden_layers"]
    passes = 3 * layers + (layers if recompute is True else recompute)
    assert attention == passes * 4 * SHAPE["hidden_size"] * batch.num_tokens**2
    if not recompute:
        assert products == expected.model - expected.attention


def test_without_an_adapter_on_the_last_map_that_map_is_not_recomputed(folder: Path) -> None:
    lora = LoraConfig(targets=("q_proj", "up_proj"))
    model = build(folder, {"bits": 32, "attention": "eager", "activation_checkpointing": True}, lora)
    batch = packed_row()
    with FlopCounterMode(display=False) as counter:
        model(batch).backward()
    expected = step_flops(tuned(attention="eager", recompute=True, targets=lora.targets), Work.of([batch]))
    assert counter.get_total_flops() == expected.hardware


def test_twice_the_samples_are_twice_the_flops() -> None:
    once, twice = Work.of([packed_row()]), Work.of([packed_row(), packed_row()])
    model = tuned()
    assert step_flops(model, twice).model == 2 * step_flops(model, once).model
    assert step_flops(model, twice).hardware == 2 * step_flops(model, once).hardware


def test_a_7b_needs_four_flops_a_weight_and_token_and_six_under_recomputation() -> None:
    """LoRA: no gradient of the frozen weights."""
    model = TunedModel(PRESETS["llama-2-7b"], last_layer="all")
    work = SampleSizes().row(8192, items=1682)
    per_weight = step_flops(model, work).model / work.tokens / model.architecture.linear_weights
    assert 4.0 < per_weight < 4.15
    recomputed = step_flops(dataclasses.replace(model, recompute=True), work)
    assert recomputed.model == step_flops(model, work).model
    assert 6.0 < recomputed.hardware / work.tokens / model.architecture.linear_weights < 6.2


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("last_layer", ["answers", "all"])
def test_products_of_a_last_layer(folder: Path, last_layer: Any, recompute: bool) -> None:
    """To the last FLOP but attention's, which the counter does not know on the CPU."""
    model = build(folder, {"bits": 32, "activation_checkpointing": recompute}, LoraConfig())
    model.kernels = dataclasses.replace(model.kernels, last_layer=last_layer)
    batch = packed_row()
    with FlopCounterMode(display=False) as counter:
        model(batch).backward()
    expected = step_flops(tuned(last_layer=last_layer, recompute=recompute), Work.of([batch]))
    assert expected.attention % 3 == 0
    # Scores once more in the backward pass, and forward and backward again where it is recomputed.
    attention = expected.attention + expected.attention // 6 + (expected.attention // 3 if recompute else 0)
    assert counter.get_total_flops() == expected.hardware - attention


def test_a_last_layer_for_answers_saves_most_of_a_layer() -> None:
    work = SampleSizes().row(8192, items=1682)
    whole, few = (step_flops(TunedModel(PRESETS["llama-2-7b"], last_layer=rows), work) for rows in ("all", "answers"))
    assert 0.75 < 32 * (whole.model - few.model) / whole.model < 0.85
    assert 0.75 < 32 * (whole.hardware - few.hardware) / whole.hardware < 0.85


def test_scores_are_computed_again_and_nothing_is_padded() -> None:
    found = step_flops(tuned(attention="packed"), Work.of([packed_row()]))
    assert found.hardware - found.model == found.attention // 6
