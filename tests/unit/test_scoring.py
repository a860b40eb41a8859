from pathlib import Path

import numpy as np
import pytest
import torch

from llara_dist.data.samples import Sample
from llara_dist.evaluation.decode import generate
from llara_dist.evaluation.prompts import read_prompts
from llara_dist.evaluation.scoring import Likelihoods, score_candidates
from llara_dist.model.hybrid import HybridLlama
from llara_dist.stream.batch import collate
from tests.tiny import make_sample
from tests.unit.test_decode import build

EOS = 1


def score(model: HybridLlama, samples: list[Sample], hybrid: bool, answers: list[np.ndarray]) -> Likelihoods:
    candidates = np.stack([sample.candidates for sample in samples])
    return score_candidates(model, read_prompts(model, samples, hybrid), candidates, answers)


@pytest.fixture
def answers() -> list[np.ndarray]:
    random = np.random.default_rng(5)
    return [np.array([*random.integers(2, 400, int(random.integers(1, 6))), EOS], np.uint32) for _ in range(50)]


@pytest.mark.parametrize("hybrid", [True, False])
@pytest.mark.parametrize("attention", ["packed", "eager"])
def test_scores_equal_those_of_each_answer_alone(
    random_llama: Path, answers: list[np.ndarray], hybrid: bool, attention: str
) -> None:
    model = build(random_llama, attention=attention)
    samples = [make_sample(key) for key in range(4)]
    scores = score(model, samples, hybrid, answers)
    for row, sample in enumerate(samples):
        for column, item in enumerate(sample.candidates):
            answer = torch.from_numpy(answers[item].astype(np.int64))
            prompt = model.embed(collate([sample], [hybrid], answers=False))
            following = model.llm.get_input_embeddings()(answer[None])  # pyright: ignore[reportCallIssue]
            with torch.no_grad():
                logits = model.llm(inputs_embeds=torch.cat([prompt, following], dim=1), use_cache=False).logits[0]
            predicted = logits[-len(answer) - 1 : -1].log_softmax(dim=-1)
            expected = predicted.gather(1, answer[:, None]).sum().item()
            assert scores.total[row, column] == pytest.approx(expected, abs=1e-4)
            assert scores.tokens[row, column] == len(answer)
    assert scores.per_token[0, 0] == scores.total[0, 0] / scores.tokens[0, 0]


def test_the_targets_score_is_minus_the_training_loss(random_llama: Path) -> None:
    model = build(random_llama)
    sample = make_sample(2)
    answers = [np.array([7, EOS], np.uint32)] * 50
    answers[sample.target] = sample.tokens[sample.answer_start : sample.answer_end]
    scores = score(model, [sample], True, answers)
    with torch.no_grad():
        loss = model(collate([sample], [True])).item()
    assert scores.total[0, sample.target_index] == pytest.approx(-loss, abs=1e-4)


@pytest.mark.parametrize(("bits", "tolerance"), [(32, 2e-5), (4, 1e-3)])
def test_scores_do_not_depend_on_the_batch(
    random_llama: Path, answers: list[np.ndarray], bits: int, tolerance: float
) -> None:
    model = build(random_llama, bits=bits)
    samples = [make_sample(key) for key in range(7)]
    together = score(model, samples, True, answers).total
    alone = np.concatenate([score(model, [sample], True, answers).total for sample in samples])
    np.testing.assert_allclose(together, alone, atol=tolerance)
    assert np.array_equal(together.argsort(axis=1), alone.argsort(axis=1))


def test_half_precision_scores_stay_close(random_llama: Path, answers: list[np.ndarray]) -> None:
    model = build(random_llama)
    samples = [make_sample(key) for key in range(3)]
    exact = score(model, samples, True, answers).total
    model.dtype = torch.bfloat16
    np.testing.assert_allclose(score(model, samples, True, answers).total, exact, rtol=0.05)


def test_ranking_leaves_the_prompts_as_they_were(random_llama: Path, answers: list[np.ndarray]) -> None:
    model = build(random_llama)
    samples = [make_sample(key) for key in range(5)]
    candidates = np.stack([sample.candidates for sample in samples])
    prompts = read_prompts(model, samples, True)
    first = score_candidates(model, prompts, candidates, answers)
    assert np.array_equal(score_candidates(model, prompts, candidates, answers).total, first.total)
    untouched = generate(model, read_prompts(model, samples, True), EOS, 8)
    assert generate(model, prompts, EOS, 8) == untouched


def test_answers_of_eos_alone_are_scored(random_llama: Path) -> None:
    model = build(random_llama)
    sample = make_sample(1)
    scores = score(model, [sample], True, [np.array([EOS], np.uint32)] * 50)
    assert scores.tokens.tolist() == [[1] * 5]
    assert len(set(scores.total[0].tolist())) == 1
