"""HybridLlama: packing, in-place behaviour embeddings, answer-only loss, what trains and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llara_dist.config import LoraConfig, ModelConfig, ProjectorConfig
from llara_dist.errors import InputError
from llara_dist.model.hybrid import HybridLlama, build_hybrid_llama
from llara_dist.stream.batch import collate, empty_batch
from tests.tiny import make_sample

CPU = torch.device("cpu")


def build(
    path: Path,
    bits: int = 32,
    attention: str = "packed",
    dropout: float = 0.0,
    seed: int = 1,
    activation_checkpointing: bool = False,
) -> HybridLlama:
    table = torch.randn(50, 16, generator=torch.Generator().manual_seed(3))
    model = build_hybrid_llama(
        ModelConfig(
            path=str(path),
            bits=bits,  # pyright: ignore[reportArgumentType]
            attention=attention,  # pyright: ignore[reportArgumentType]
            activation_checkpointing=activation_checkpointing,
        ),
        LoraConfig(dropout=dropout),
        ProjectorConfig(),
        table,
        CPU,
        seed,
    )
    for name, parameter in model.lora_parameters().items():  # B starts at zero; tests want adapters that do something
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.parametrize("bits", [32, 4])
def test_packed_row_equals_single_rows(random_llama: Path, bits: int) -> None:
    model = build(random_llama, bits).eval()
    samples = [make_sample(key) for key in range(5)]
    hybrid = [True, False, True, True, False]
    packed = model.answer_logits(collate(samples, hybrid))
    single = torch.cat([model.answer_logits(collate([s], [h])) for s, h in zip(samples, hybrid, strict=True)])
    torch.testing.assert_close(packed, single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_attention_equals_transformers(random_llama: Path, attention: str) -> None:
    batch = collate([make_sample(key) for key in range(4)], [True, True, False, True])
    ours = build(random_llama).eval().answer_logits(batch)
    theirs = build(random_llama, attention=attention).eval().answer_logits(batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_behaviour_embeddings_are_at_their_slots_and_nowhere_else(random_llama: Path) -> None:
    model = build(random_llama)
    batch = collate([make_sample(0), make_sample(1)], [True, True])
    embedded = model.embed(batch)[0]
    expected = model.projector(model.item_table)[batch.unique_items[batch.slot_inverse]]
    torch.testing.assert_close(embedded[batch.slot_positions], expected)
    rest = torch.ones(len(batch.tokens), dtype=torch.bool)
    rest[batch.slot_positions] = False
    plain = model.llm.get_input_embeddings()(batch.tokens)
    torch.testing.assert_close(embedded[rest], plain[rest], rtol=0, atol=0)


def test_slot_token_ids_never_matter(random_llama: Path) -> None:
    import dataclasses

    model = build(random_llama).eval()
    batch = collate([make_sample(0)], [True])
    tokens = batch.tokens.clone()
    tokens[batch.slot_positions] = 399
    assert torch.equal(model(batch), model(dataclasses.replace(batch, tokens=tokens)))


def test_loss_is_the_sum_over_answers_of_full_logits(random_llama: Path) -> None:
    model = build(random_llama).eval()
    sample = make_sample(4)
    batch = collate([sample], [False])
    full = model.llm(input_ids=batch.tokens[None]).logits[0]
    text = batch.tokens
    length = sample.answer_end - sample.answer_start
    expected = torch.nn.functional.cross_entropy(full[-length - 1 : -1], text[-length:], reduction="sum")
    torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-5)
    assert int(batch.labels[-1]) == 1  # EOS is taught


@pytest.mark.parametrize("batch", [collate([make_sample(0)], [False]), empty_batch()], ids=["text-only", "empty"])
def test_projector_has_finite_zero_gradients_without_slots(random_llama: Path, batch) -> None:
    model = build(random_llama)
    model(batch).backward()
    for name, parameter in model.projector_parameters().items():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_empty_batch_has_zero_loss_and_gradients_everywhere(random_llama: Path) -> None:
    model = build(random_llama)
    loss = model(empty_batch())
    loss.backward()
    assert loss.item() == 0.0
    for name, parameter in {**model.lora_parameters(), **model.projector_parameters()}.items():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_only_adapters_and_projector_train_and_in_float32(random_llama: Path) -> None:
    model = build(random_llama, bits=4)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable.keys() == (model.lora_parameters() | model.projector_parameters()).keys()
    assert len(model.lora_parameters()) == 2 * 7 * 2
    assert {parameter.dtype for parameter in trainable.values()} == {torch.float32}


def test_four_bit_weights_are_packed_and_double_quantised(random_llama: Path) -> None:
    import bitsandbytes as bnb

    model = build(random_llama, bits=4)
    quantised = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(quantised) == 14
    for module in quantised:
        assert module.weight.dtype == torch.uint8
        assert module.weight.quant_state.quant_type == "nf4"
        assert module.weight.quant_state.nested
        assert module.weight.numel() * 2 == module.in_features * module.out_features


def test_same_seed_same_parameters(random_llama: Path) -> None:
    first, second, other = (build(random_llama, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_projector_starts_at_the_scale_of_token_embeddings(random_llama: Path) -> None:
    model = build(random_llama)
    tokens = model.llm.get_input_embeddings().weight
    behaviour = model.projector(model.item_table)
    assert behaviour.square().mean().sqrt().item() == pytest.approx(tokens.square().mean().sqrt().item(), rel=1e-4)


def test_activation_checkpointing_changes_no_gradient(random_llama: Path) -> None:
    batch = collate([make_sample(0), make_sample(1)], [True, False])
    gradients = []
    for checkpointing in (False, True):
        model = build(random_llama, activation_checkpointing=checkpointing).train()
        model(batch).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert any(module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing"))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_not_a_llama_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config.json"):
        build(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(InputError, match=r"architecture 'gpt2'; only Llama"):
        build(tmp_path)


def test_unknown_lora_target(random_llama: Path) -> None:
    with pytest.raises(InputError, match=r"no layer of the model is named 'qkv'"):
        build_hybrid_llama(
            ModelConfig(path=str(random_llama), bits=32),
            LoraConfig(targets=("qkv",)),
            ProjectorConfig(),
            torch.randn(50, 16),
            CPU,
            0,
        )


def test_evaluation_computes_in_float32_as_training_does(random_llama: Path) -> None:
    model = build(random_llama, bits=4)
    batch = collate([make_sample(0), make_sample(1)], [True, False])
    with torch.no_grad():
        trained = model.train().answer_logits(batch)
        evaluated = model.eval().answer_logits(batch)
    torch.testing.assert_close(evaluated, trained, rtol=1e-6, atol=1e-6)
