"""The arms of the speed benchmarks compute the same thing; their times would say nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import scoring
from benchmarks.arms import ours, published, trainers
from benchmarks.arms.inputs import write_random_nf4
from benchmarks.arms.setup import Setup, set_trained, text_loss
from llara_dist.config import LoraConfig, ModelConfig, ProjectorConfig
from llara_dist.model.hybrid import HybridLlama, build_hybrid_llama
from llara_dist.recommenders.item_table import load_item_table, write_recommender
from llara_dist.recommenders.sasrec import SASRec
from llara_dist.stream.batch import collate
from tests.tiny import make_sample, write_tokenizer

SAMPLES = [make_sample(key) for key in range(5)]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("arms")
    write_tokenizer(folder / "tokenizer", ["some titles to learn a few merges from"])
    write_random_nf4(folder / "model", "tiny", folder / "tokenizer", torch.device("cpu"))
    torch.manual_seed(0)  # of some item tables the hybrid loss is by chance that of the text-only rows
    write_recommender(folder / "rec", SASRec(50, 10, dim=16), {"model": "sasrec", "dataset_hash": "", "scores": {}})
    return Setup(
        model=str(folder / "model"),
        shards="",
        recommender=str(folder / "rec"),
        scratch=str(folder),
        device="cpu",
        threads=1,
        global_batch=5,
        budget=1024,
        rows=5,
        steps=1,
        lora=LoraConfig(dropout=0.0),
    )


@pytest.fixture(scope="module")
def model(setup: Setup) -> HybridLlama:
    table = load_item_table(Path(setup.recommender)).weight
    config = ModelConfig(path=setup.model, bits=4)
    built = build_hybrid_llama(config, setup.lora, ProjectorConfig(), table, torch.device("cpu"), seed=0).train()
    set_trained([*built.lora_parameters().items(), *built.projector_parameters().items()])
    return built


def test_the_published_way_gives_our_loss_and_gradients(setup: Setup, model: HybridLlama) -> None:
    theirs = published.load(setup)
    loss, positions = theirs(SAMPLES)
    loss.backward()
    batch = collate(SAMPLES, [True] * len(SAMPLES))
    mine = model(batch) / batch.answer_tokens
    model.zero_grad()
    mine.backward()
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    assert positions > batch.num_tokens  # it pads, we do not
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    ours_trained = {**model.lora_parameters(), **model.projector_parameters()}
    assert gradients.keys() == ours_trained.keys()
    for name, parameter in ours_trained.items():
        expected = gradients[name]
        assert expected is not None
        assert float(expected.abs().max()) > 0, name
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_text_trainer_gives_our_loss_on_text_only_rows(setup: Setup, model: HybridLlama) -> None:
    theirs = trainers.load_quantised(setup, recompute=False)
    expected = ours.answer_loss(model, SAMPLES, hybrid=False)
    assert text_loss(theirs, SAMPLES, setup) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(ours.answer_loss(model, SAMPLES, hybrid=True), rel=1e-3)


def test_separate_sequences_score_candidates_as_one_shared_prompt_does(model: HybridLlama) -> None:
    random = np.random.default_rng(5)
    answers = [np.array([*random.integers(2, 400, int(random.integers(1, 6))), 1], np.uint32) for _ in range(50)]
    was = model.training
    model.eval()
    together = scoring.shared_prompt(model, SAMPLES, answers)
    # As few positions a batch as there can be, then all candidates in one.
    for tokens in (1, 100_000):
        separate = scoring.separate_sequences(model, SAMPLES, answers, tokens)
        np.testing.assert_allclose(together, separate, atol=1e-4)
    model.train(was)
