"""Scores, patience, shares of rows, and the model lent out and taken back."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llara_dist.config import LoraConfig, ModelConfig, ProjectorConfig, RunConfig, ValidationConfig
from llara_dist.data import build as shards
from llara_dist.data.prepare import prepare
from llara_dist.data.tokenizer import load_tokenizer
from llara_dist.distributed import World
from llara_dist.errors import InputError
from llara_dist.evaluation.decode import generate
from llara_dist.evaluation.language_model import causal_model
from llara_dist.evaluation.lockstep import ALONE, Lockstep
from llara_dist.evaluation.metrics import judge_exact
from llara_dist.evaluation.predict import predict
from llara_dist.evaluation.prompts import read_prompts
from llara_dist.evaluation.scoring import score_candidates
from llara_dist.evaluation.validation import (
    RunValidator,
    Tally,
    by_candidates,
    expected_hits,
    open_validator,
    turns_of,
)
from llara_dist.integrity import json_text, parse_json
from llara_dist.model.hybrid import HybridLlama, build_hybrid_llama
from llara_dist.model.tiny import tiny_base
from llara_dist.recommenders.item_table import load_item_table
from llara_dist.stream.locations import mix, node_cache, open_samples
from llara_dist.stream.reader import ShardSet
from llara_dist.training.evaluation_mode import evaluation_mode, is_partitioned
from llara_dist.training.scores import Patience, ValidationScores, is_better
from tests.runs import RECIPE
from tests.tiny import make_sample
from tests.unit.test_decode import EOS, build
from tests.validation import answering, make_answering_inputs

LOSSES = st.sampled_from([0.5, 1.0, 1.5, math.nan, math.inf])
SCORES = st.builds(
    ValidationScores,
    step=st.integers(0, 1000),
    loss=LOSSES,
    hit_ratio=st.sampled_from([0.0, 0.25, 0.5]),
    valid_ratio=st.sampled_from([None, 0.5]),
    rows=st.just(4),
    seconds=st.just(1.0),
)


def scores(step: int, hit_ratio: float, loss: float) -> ValidationScores:
    return ValidationScores(step=step, hit_ratio=hit_ratio, loss=loss, valid_ratio=None, rows=94, seconds=1.0)


def test_higher_hit_ratio_is_better_and_loss_breaks_ties() -> None:
    best = scores(10, 0.4, 1.0)
    assert is_better(best, None)
    assert is_better(scores(20, 0.5, 9.0), best)
    assert not is_better(scores(20, 0.3, 0.1), best)
    assert is_better(scores(20, 0.4, 0.9), best)
    assert not is_better(scores(20, 0.4, 1.1), best)
    assert not is_better(scores(20, 0.4, 1.0), best)  # equal: the earlier stays


@pytest.mark.parametrize("diverged", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_the_worst(diverged: float) -> None:
    assert is_better(scores(20, 0.4, 9.0), scores(10, 0.4, diverged))
    assert not is_better(scores(20, 0.4, diverged), scores(10, 0.4, 9.0))
    assert not is_better(scores(20, 0.4, diverged), scores(10, 0.4, diverged))
    assert is_better(scores(20, 0.5, diverged), scores(10, 0.4, 1.0))


@given(st.lists(SCORES, min_size=1, max_size=12), st.integers(0, 4))
def test_patience_holds_the_first_of_the_best(found: list[ValidationScores], limit: int) -> None:
    state = Patience(limit)
    for number, each in enumerate(found):
        state = state.after(each)
        seen = found[: number + 1]
        ranked = max(range(len(seen)), key=lambda place: (merit(seen[place]), -place))
        assert state.best is seen[ranked]
        assert state.since_best == number - ranked
        assert state.exhausted == (limit > 0 and number - ranked >= limit)


def merit(each: ValidationScores) -> tuple[float, float]:
    return each.hit_ratio, -each.loss if math.isfinite(each.loss) else -math.inf


@given(st.lists(SCORES, max_size=12), st.lists(SCORES, max_size=6), st.integers(0, 4))
def test_a_resumed_patience_goes_on_as_one_left_alone(
    before: list[ValidationScores], after: list[ValidationScores], limit: int
) -> None:
    state = Patience(limit)
    for each in before:
        state = state.after(each)
    resumed = Patience.from_dict(limit, parse_json(json_text(state.to_dict()).encode(), "state.json", "a state"))
    for each in after:
        state, resumed = state.after(each), resumed.after(each)
        assert state.exhausted == resumed.exhausted
    assert repr(state).replace("inf", "nan") == repr(resumed).replace("inf", "nan")  # NaN is unequal to itself


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60),
    size=st.integers(1, 9),
    batch_size=st.integers(1, 8),
)
def test_turns_cover_the_rows_once_and_are_equally_many(lengths: list[int], size: int, batch_size: int) -> None:
    ids = np.arange(len(lengths)) + 100
    by_rank = [turns_of(ids, np.array(lengths), rank, size, batch_size) for rank in range(size)]
    assert {len(turns) for turns in by_rank} == {math.ceil(math.ceil(len(ids) / size) / batch_size)}
    counted = [turn.ids for turns in by_rank for turn in turns if turn.counted]
    assert sorted(np.concatenate(counted).tolist()) == ids.tolist()
    for turn in range(len(by_rank[0])):
        at_once = {int(row) for turns in by_rank if turns[turn].counted for row in turns[turn].ids}
        for turns in by_rank:
            assert 1 <= len(turns[turn].ids) <= batch_size
            if not turns[turn].counted:
                assert set(turns[turn].ids.tolist()) <= at_once  # nobody waits for a stand-in


def test_a_rank_without_rows_keeps_step_with_the_shortest() -> None:
    lengths = np.array([5, 3, 9])
    assert [turn.ids.tolist() for turn in turns_of(np.arange(3), lengths, 3, 4, 2)] == [[1]]
    assert not turns_of(np.arange(3), lengths, 3, 4, 2)[0].counted
    assert [turn.ids.tolist() for turn in turns_of(np.arange(3), lengths, 0, 1, 2)] == [[2, 0], [1]]


def test_tallies_add() -> None:
    parts = [Tally(1.5, 3, 1.0, 1, 2), Tally(2.5, 4, 0.5, 2, 3)]
    assert sum(parts, Tally()) == Tally(4.0, 7, 1.5, 3, 5)


def test_expected_hits_share_ties_and_miss_what_is_not_a_number() -> None:
    likelihoods = np.array([[-1.0, -2.0], [-1.0, -1.0], [-3.0, -2.0], [np.nan, -9.0], [-1.0, np.nan]])
    assert expected_hits(likelihoods, np.zeros(5, dtype=np.int64)) == 1.5
    assert expected_hits(np.full((2, 3), np.nan), np.array([0, 1])) == 0.0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, rec/ and shards/ of a run on the shipped base."""
    folder = tmp_path_factory.mktemp("answering")
    make_answering_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def model(inputs: Path) -> HybridLlama:
    """Untuned, as `answering` configures it."""
    config = answering(inputs, Path("unused"))
    table = load_item_table(config.recommender.path).weight
    return build_hybrid_llama(config.model, config.lora, config.projector, table, torch.device("cpu"), config.seed)


def engine_of(model: HybridLlama, world: World | None = None) -> Any:
    """What a validator needs of an engine, without DeepSpeed."""
    return SimpleNamespace(model=model, device=torch.device("cpu"), world=world or World())


def with_validation(inputs: Path, **settings: Any) -> RunConfig:
    return dataclasses.replace(
        answering(inputs, Path("unused")), validation=ValidationConfig(every_steps=1, **settings)
    )


@pytest.mark.parametrize("hybrid", [True, False])
def test_scores_are_those_of_predict(inputs: Path, model: HybridLlama, hybrid: bool) -> None:
    config = with_validation(inputs, batch_size=4, max_new_tokens=8)
    if not hybrid:
        never = dataclasses.replace(config.curriculum, schedule="constant", probability=0.0)
        config = dataclasses.replace(config, curriculum=never)
    samples, tokenizer = ShardSet.open(config.data.shards, "val"), load_tokenizer(config.model.path)
    titles = samples.titles()
    model.eval()
    predictions, _ = predict(
        model, samples, np.arange(len(samples)), tokenizer, titles, hybrid=hybrid, max_new_tokens=8
    )
    assert predictions.generated is not None
    assert predictions.log_likelihoods is not None
    assert predictions.answer_tokens is not None
    judged = [
        judge_exact(text, titles[target], [titles[item] for item in shown])
        for text, target, shown in zip(predictions.generated, predictions.targets, predictions.candidates, strict=True)
    ]
    own = np.arange(len(samples)), predictions.target_index
    beats: list[int] = []
    validator = open_validator(config, World(), lambda: beats.append(1))
    assert validator is not None
    found = validator(engine_of(model), 17)
    assert (found.step, found.rows) == (17, 15)
    assert found.valid_ratio == np.mean([verdict.valid for verdict in judged])
    assert 0 < found.valid_ratio < 1
    assert found.hit_ratio == np.mean([verdict.hit for verdict in judged])
    loss = -predictions.log_likelihoods[own].sum() / predictions.answer_tokens[own].sum()
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert len(beats) > 2 * 4  # four batches, each of at least two tokens

    ranked = open_validator(
        dataclasses.replace(config, validation=dataclasses.replace(config.validation, generation=False)), World()
    )
    assert ranked is not None
    by_likelihood = ranked(engine_of(model), 17)
    assert by_likelihood.valid_ratio is None
    best = predictions.log_likelihoods.argmax(axis=1) == predictions.target_index
    assert by_likelihood.hit_ratio == pytest.approx(best.mean(), abs=1e-12)
    assert by_likelihood.loss == pytest.approx(loss, rel=1e-5)


def test_shares_of_ranks_add_up(inputs: Path, model: HybridLlama) -> None:
    config = with_validation(inputs, rows=7, batch_size=2, generation=False)
    one = open_validator(config, World())
    assert one is not None
    whole = one(engine_of(model), 0)
    assert whole.rows == 7
    parts = []
    for rank in range(3):
        share = open_validator(config, World(rank, rank, 3))
        assert share is not None
        parts.append(share(engine_of(model), 0))  # no process group: each keeps its own counts
    assert sum(part.rows for part in parts) == 7
    hits = sum(part.hit_ratio * part.rows for part in parts)
    assert hits == pytest.approx(whole.hit_ratio * 7, abs=1e-9)


def test_a_mixture_of_unequal_numbers_of_candidates_is_pooled(inputs: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "other.yaml"
    recipe.write_text(RECIPE.replace("small", "other").replace("count: 10", "count: 5").replace("seed: 5", "seed: 6"))
    prepare(recipe=str(recipe), out=tmp_path / "data")
    shards.build(data=tmp_path / "data", tokenizer=tiny_base(), out=tmp_path / "shards", processes=1)
    mix([str(inputs / "shards"), str(tmp_path / "shards")], tmp_path / "mixture")
    config = with_validation(inputs, batch_size=4, generation=False)
    table = torch.randn(80, 16, generator=torch.Generator().manual_seed(0))
    model = build_hybrid_llama(config.model, config.lora, config.projector, table, torch.device("cpu"), config.seed)
    found = []
    for place in ("mixture", "shards"):
        mixed = dataclasses.replace(config, data=dataclasses.replace(config.data, shards=str(tmp_path / place)))
        validator = open_validator(mixed, World())
        assert validator is not None
        found.append(validator(engine_of(model), 0))
    both, other = found
    assert (both.rows, other.rows) == (15 + 6, 6)
    samples = open_samples(str(tmp_path / "mixture"), "val", node_cache(config.data))
    groups = by_candidates(samples, np.array([20, 0, 15, 2]))
    assert [group.tolist() for group in groups] == [[20, 15], [0, 2]]
    assert [len(sample.candidates) for sample in samples.read([20, 15, 0, 2])] == [5, 5, 10, 10]


def test_no_validation_unless_asked_for(inputs: Path) -> None:
    assert open_validator(answering(inputs, Path("unused")), World()) is None


def test_a_split_without_rows_is_refused(inputs: Path) -> None:
    class Nothing:
        def __len__(self) -> int:
            return 0

    samples: Any = Nothing()
    config = with_validation(inputs)
    with pytest.raises(InputError, match=r"the validation split holds no rows; set validation.every_steps=0"):
        RunValidator(config, samples, load_tokenizer(config.model.path), World())


def test_the_model_comes_back_as_it_was_lent(random_llama: Path) -> None:
    model = build(random_llama, bits=4)
    model.train()
    model.projector.eval()
    dropout: Any = next(
        module for module in model.modules() if isinstance(module, torch.nn.Dropout | torch.nn.Identity)
    )
    dropout.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: vars(m).get("support_avx512bf16_for_cpu") for name, m in model.named_modules()}
    assert len(set(modes.values())) == 2
    generator = torch.get_rng_state()
    numbers = np.random.get_state()[1].tolist()  # noqa: NPY002 (the global generator is what must stay)

    def lend(fail: bool) -> None:
        with evaluation_mode(engine_of(model)):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            torch.rand(3)
            if fail:
                raise KeyError

    lend(fail=False)
    with pytest.raises(KeyError):
        lend(fail=True)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: vars(m).get("support_avx512bf16_for_cpu") for name, m in model.named_modules()} == flags
    assert torch.equal(torch.get_rng_state(), generator)
    assert np.random.get_state()[1].tolist() == numbers  # noqa: NPY002
    assert torch.is_grad_enabled()
    assert not is_partitioned(model)


def test_four_bit_weights_keep_their_layout_on_any_cpu(random_llama: Path) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes repacks them in evaluation mode, and training would read them wrongly."""
    config = ModelConfig(path=str(random_llama), bits=4, compute_dtype="bfloat16")
    model = build_hybrid_llama(
        config, LoraConfig(), ProjectorConfig(), torch.randn(50, 16), torch.device("cpu"), seed=1
    )
    model.train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with evaluation_mode(engine_of(model)):
        read_prompts(model, [make_sample(0)], True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


class Dragging(Lockstep):
    """As if another rank's answers were all as long as may be, and it called the head twice more."""

    def any(self, flag: bool) -> bool:
        return True

    def most(self, count: int) -> int:
        return count + 2


def test_a_rank_that_keeps_step_answers_the_same(random_llama: Path) -> None:
    model = build(random_llama)
    samples = [make_sample(2)] * 3
    endless = generate(model, read_prompts(model, samples, True), -1, 12)
    end = endless[0].tokens[2]  # the rows are done when they come to it, the other rank is not
    alone = generate(model, read_prompts(model, samples, True), end, 12)
    assert all(answer.finished and len(answer.tokens) <= 2 for answer in alone)
    beats: list[int] = []
    dragged = generate(model, read_prompts(model, samples, True), end, 12, Dragging(), lambda: beats.append(1))
    assert dragged == alone
    assert len(beats) == 12


def test_head_calls_for_another_rank_change_no_score(random_llama: Path) -> None:
    model = build(random_llama)
    samples = [make_sample(key) for key in range(3)]
    answers = [np.array([7 + item, EOS], np.uint32) for item in range(50)]
    shown = np.stack([sample.candidates for sample in samples])
    prompts = read_prompts(model, samples, True)
    heads: list[int] = []
    causal_model(model).lm_head.register_forward_hook(lambda *_: heads.append(1))
    alone = score_candidates(model, prompts, shown, answers, ALONE).total
    assert len(heads) == 1
    assert np.array_equal(score_candidates(model, prompts, shown, answers, Dragging()).total, alone)
    assert len(heads) == 1 + 3
