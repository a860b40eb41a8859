from pathlib import Path

import pytest
import torch

from llara_dist.config import LoraConfig, ModelConfig, ProjectorConfig
from llara_dist.evaluation.decode import Generation, generate
from llara_dist.evaluation.prompts import left_padded, read_prompts
from llara_dist.model.hybrid import HybridLlama, build_hybrid_llama
from llara_dist.stream.batch import collate
from tests.tiny import make_sample

EOS = 1


def build(path: Path, bits: int = 32, attention: str = "packed") -> HybridLlama:
    """A random model whose adapters do something and that ends some answers early."""
    model = build_hybrid_llama(
        ModelConfig(path=str(path), bits=bits, attention=attention),  # pyright: ignore[reportArgumentType]
        LoraConfig(dropout=0.0),
        ProjectorConfig(),
        torch.randn(50, 16, generator=torch.Generator().manual_seed(3)),
        torch.device("cpu"),
        seed=1,
    )
    for name, parameter in model.lora_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def by_hand(model: HybridLlama, key: int, hybrid: bool, limit: int) -> Generation:
    """Greedy decoding of one sample without cache, padding or batch: the whole row again for every token."""
    batch = collate([make_sample(key)], [hybrid], answers=False)
    embeddings, tokens = model.embed(batch), []
    for _ in range(limit):
        logits = model.llm(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
        token = int(logits.argmax())
        if token == EOS:
            return Generation(tokens, True)
        tokens.append(token)
        following = model.llm.get_input_embeddings()(torch.tensor([[token]]))  # pyright: ignore[reportCallIssue]
        embeddings = torch.cat([embeddings, following], dim=1)
    return Generation(tokens, False)


def answer(model: HybridLlama, keys, hybrid: bool, limit: int) -> list[Generation]:
    return generate(model, read_prompts(model, [make_sample(key) for key in keys], hybrid), EOS, limit)


@pytest.fixture
def ending_llama(random_llama: Path) -> HybridLlama:
    """EOS is made likely enough that answers end at different lengths."""
    model = build(random_llama)
    head = model.llm.get_base_model().lm_head  # pyright: ignore[reportCallIssue,reportAttributeAccessIssue]
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    head.weight.data[EOS] = 0.25 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("hybrid", [True, False])
def test_generation_equals_decoding_by_hand(ending_llama: HybridLlama, hybrid: bool) -> None:
    keys = range(16)
    with torch.no_grad():
        expected = [by_hand(ending_llama, key, hybrid, 12) for key in keys]
    assert answer(ending_llama, keys, hybrid, 12) == expected
    lengths = {len(one.tokens) for one in expected}
    assert len(lengths) > 2, "the test needs answers of different lengths"
    assert {one.finished for one in expected} == {True, False}


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("bits", [32, 4])
def test_answers_do_not_depend_on_the_batch(random_llama: Path, attention: str, bits: int) -> None:
    model = build(random_llama, bits, attention)
    alone = [answer(model, [key], True, 10)[0] for key in range(12)]
    for size in (5, 12):
        parts = [range(start, min(start + size, 12)) for start in range(0, 12, size)]
        assert [one for part in parts for one in answer(model, part, True, 10)] == alone
    assert answer(model, range(11, -1, -1), True, 10) == alone[::-1]
    assert len({tuple(one.tokens) for one in alone}) > 6, "the test needs a model that tells prompts apart"


def test_behaviour_embeddings_reach_the_answer(random_llama: Path) -> None:
    model = build(random_llama)
    before, text = (answer(model, range(6), hybrid, 8) for hybrid in (True, False))
    model.item_table.mul_(-3.0)
    assert answer(model, range(6), True, 8) != before
    assert answer(model, range(6), False, 8) == text


def test_the_limit_counts_eos_and_is_kept(random_llama: Path) -> None:
    model = build(random_llama)
    prompts = read_prompts(model, [make_sample(0)], True)
    answers = generate(model, prompts, eos=-1, max_new_tokens=5)
    assert [len(one.tokens) for one in answers] == [5]
    assert not answers[0].finished


def test_left_padding_puts_every_row_at_the_right() -> None:
    packed = torch.arange(1.0, 7.0)[:, None]
    block, real = left_padded(packed, torch.tensor([0, 2, 6], dtype=torch.int32))
    assert block[..., 0].tolist() == [[0, 0, 1, 2], [3, 4, 5, 6]]
    assert real.tolist() == [[False, False, True, True], [True] * 4]
