"""The last layer computed for the answers' rows alone: the same loss, gradients and names, fewer rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from llara_dist.config import KernelsConfig, LoraConfig, ModelConfig, ProjectorConfig
from llara_dist.model.hybrid import HybridLlama, build_hybrid_llama
from llara_dist.model.packing import AnswerRows, Packing
from llara_dist.stream.batch import Batch, collate, empty_batch
from tests.tiny import make_sample

SAMPLES = [make_sample(key) for key in range(5)]
HYBRID = [True, False, True, True, False]


def build(path: Path, last_layer: Literal["answers", "all"] = "answers", **model: Any) -> HybridLlama:
    table = torch.randn(50, 16, generator=torch.Generator().manual_seed(3))
    config, kernels = ModelConfig(path=str(path), **model), KernelsConfig(last_layer=last_layer)
    cpu = torch.device("cpu")
    built = build_hybrid_llama(config, LoraConfig(dropout=0.0), ProjectorConfig(), table, cpu, seed=1, kernels=kernels)
    for name, parameter in built.lora_parameters().items():  # B starts at zero, and A would have no gradient
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return built.train()


@pytest.mark.parametrize(
    "batch",
    [collate(SAMPLES, HYBRID), collate(SAMPLES, HYBRID, answers=False), empty_batch()],
    ids=["answers", "no answers", "empty"],
)
def test_rows_are_the_ends_of_samples(batch: Batch) -> None:
    rows = AnswerRows.of(batch, Packing.of(batch, "sdpa"))
    ends = batch.cu_seqlens[1:].tolist()
    expected = [
        list(range(end - count - 1, end)) for end, count in zip(ends, batch.answer_lengths, strict=True)
    ]  # a row more than labels
    assert rows.positions.tolist() == [position for positions in expected for position in positions]
    assert torch.equal(rows.positions[rows.labels], batch.label_positions)
    queries = rows.packing.queries
    assert queries.lengths == tuple(len(positions) for positions in expected)
    assert queries.boundaries.diff().tolist() == list(queries.lengths)
    assert queries.boundaries.dtype == torch.int32
    assert int(queries.boundaries[0]) == 0


@pytest.mark.parametrize(
    "model",
    [{"bits": 32}, {"bits": 4}, {"bits": 32, "activation_checkpointing": True}],
    ids=["float32", "nf4", "recomputed"],
)
def test_loss_and_gradients_are_those_of_a_whole_layer(random_llama: Path, model: dict[str, Any]) -> None:
    """Equal to float32's rounding, relative to each tensor's size."""
    batch = collate(SAMPLES, HYBRID)
    found = {}
    for last_layer in ("answers", "all"):
        built = build(random_llama, last_layer, **model)
        loss = built(batch)
        loss.backward()
        found[last_layer] = {n: p.grad for n, p in built.named_parameters() if p.requires_grad} | {
            "loss": loss.detach()
        }
    assert found["answers"].keys() == found["all"].keys()
    for name, expected in found["all"].items():
        ours = found["answers"][name]
        assert ours is not None, name
        assert bool(expected.any()), name
        assert float((ours - expected).norm() / expected.norm()) < 1e-5, name


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_only_the_answers_rows_are_computed(random_llama: Path, recompute: bool) -> None:
    built, batch = build(random_llama, activation_checkpointing=recompute, bits=32), collate(SAMPLES, HYBRID)
    last = built.llm.base_model.model.model.layers[-1]
    rows: dict[str, list[int]] = {}
    handles = [
        module.register_forward_hook(
            lambda _module, _given, output, name=name: rows.setdefault(name, []).append(output.shape[1])
        )
        for name, module in last.named_modules()
        if name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
    ]
    built(batch).backward()
    for handle in handles:
        handle.remove()
    few, all_of_them = len(batch.labels) + batch.num_samples, batch.num_tokens
    times = 2 if recompute else 1
    assert few < all_of_them / 4
    assert rows == {
        "self_attn.q_proj": [few] * times,
        "self_attn.k_proj": [all_of_them] * times,
        "self_attn.v_proj": [all_of_them] * times,
        "self_attn.o_proj": [few] * times,
        "mlp.gate_proj": [few] * times,
    }


def test_names_and_every_other_call_stay_as_they_are(random_llama: Path) -> None:
    ours, whole = (build(random_llama, last_layer, bits=32).eval() for last_layer in ("answers", "all"))
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in whole.named_parameters()]
    prompt = torch.tensor([[0, 5, 6, 7], [0, 8, 9, 10]])
    torch.testing.assert_close(ours.llm(prompt).logits, whole.llm(prompt).logits, rtol=0, atol=0)
    generated = [
        m.llm.generate(input_ids=prompt, max_new_tokens=5, do_sample=False, use_cache=True) for m in (ours, whole)
    ]
    assert generated[0].shape == (2, 9)
    assert torch.equal(*generated)


def test_attention_over_unpacked_rows_computes_every_row(random_llama: Path) -> None:
    batch = collate(SAMPLES, HYBRID)
    for attention in ("sdpa", "eager"):
        built = build(random_llama, bits=32, attention=attention)
        assert built.kernels.last_layer == "all"
        assert f"last layer all (model.attention={attention})" in str(built.kernels)
        torch.testing.assert_close(built(batch), build(random_llama, bits=32)(batch), rtol=1e-5, atol=1e-5)


def test_a_layer_can_be_told_at_every_call(random_llama: Path) -> None:
    """What replays and comparisons rest on: the setting is the call's, not the weights'."""
    built, batch = build(random_llama, bits=32), collate(SAMPLES, HYBRID)
    few = built(batch)
    built.kernels = dataclasses.replace(built.kernels, last_layer="all")
    torch.testing.assert_close(built(batch), few, rtol=1e-5, atol=1e-5)


def test_a_compiled_layer_takes_rows_of_any_lengths(random_llama: Path) -> None:
    built = build(random_llama, bits=32)
    batches = [collate(SAMPLES[start:], HYBRID[start:]) for start in (0, 1, 2)]
    expected = [float(built(batch).detach()) for batch in batches]
    graphs: list[int] = []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(len(graphs))
        return graph.forward

    built.llm.base_model.model.model.layers[-1].compile(dynamic=True, backend=count)
    found, made = [], []
    for batch in batches:
        loss = built(batch)
        loss.backward()
        found.append(float(loss.detach()))
        made.append(len(graphs))
    assert found == pytest.approx(expected, rel=1e-5)
    assert made[0] > 0
    assert made[0] == made[-1]  # compiled once
