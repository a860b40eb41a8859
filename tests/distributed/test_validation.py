"""Validation between steps: training does not notice it, and its numbers are those of `llara-dist evaluate`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llara_dist import distributed
from llara_dist.config import RunConfig, ValidationConfig
from llara_dist.data.samples import Sample
from llara_dist.evaluation.decode import generate
from llara_dist.evaluation.evaluate import evaluate
from llara_dist.evaluation.lockstep import ALONE, Lockstep
from llara_dist.evaluation.prompts import read_prompts
from llara_dist.evaluation.scoring import score_candidates
from llara_dist.evaluation.validation import open_validator
from llara_dist.model.hybrid import HybridLlama, build_hybrid_llama
from llara_dist.recommenders.item_table import load_item_table
from llara_dist.stream.batch import collate
from llara_dist.stream.reader import ShardSet
from llara_dist.training.checkpoints.trained import load_trained
from llara_dist.training.evaluation_mode import evaluation_mode
from llara_dist.training.preflight.examine import open_inputs
from llara_dist.training.run import open_run
from tests.distributed.ranks import run_ranks
from tests.distributed.training import join, train_all
from tests.validation import answering, make_answering_inputs

STEPS = 4
FILES = ("adapter_model.safetensors", "projector.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def answering_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of a run on the shipped pre-trained base, which names candidates, in answers of different lengths."""
    folder = tmp_path_factory.mktemp("answering")
    make_answering_inputs(folder)
    return folder


def with_stage(config: RunConfig, stage: str) -> RunConfig:
    """The run under another ds_config; "sharded" before the name: ZeRO-3 keeps no parameter whole.

    The stock files keep small parameters whole on every rank, which in a model this small are all.
    """
    stock = config.deepspeed.with_name(f"{stage.removeprefix('sharded ')}.json")
    if not stage.startswith("sharded"):
        return dataclasses.replace(config, deepspeed=stock)
    settings = json.loads(stock.read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = config.out.parent / f"{stock.stem}-sharded.json"
    path.write_text(json.dumps(settings))
    return dataclasses.replace(config, deepspeed=path)


def train_and_validate(configs: list[RunConfig]) -> None:
    """Train each run, validating where its settings say so; every rank's losses and scores go to OUT/RANK.json."""
    world, device = join()
    for config in configs:
        run = open_run(config, open_inputs(config, world), world, device)
        validator = open_validator(config, world)
        said: dict[str, list[Any]] = {"losses": [], "scores": []}
        for step in run.loader:
            said["losses"].append(run.engine.train_step(step, *run.rates(step.index)).loss)
            if validator is not None and (step.index + 1) % config.validation.every_steps == 0:
                said["scores"].append(validator(run.engine, step.index + 1).to_dict())
        run.save(run.total_steps)
        (config.out / f"{world.rank}.json").write_text(json.dumps(said))
    distributed.shut_down()


def said(out: Path, rank: int = 0) -> dict[str, list[Any]]:
    return json.loads((out / f"{rank}.json").read_text())


def check_that_training_does_not_notice(
    inputs: Path, folder: Path, stages: list[str], checkpointing: bool = False
) -> None:
    configs = []
    for stage in stages:
        for every in (0, 2):
            config = with_stage(answering(inputs, folder / f"{stage}, every {every}", max_steps=STEPS), stage)
            configs.append(
                dataclasses.replace(
                    config,
                    model=dataclasses.replace(config.model, activation_checkpointing=checkpointing),
                    lora=dataclasses.replace(config.lora, dropout=0.1),
                    validation=ValidationConfig(every_steps=every, rows=7, batch_size=2, max_new_tokens=12),
                )
            )
    run_ranks(train_and_validate, 2, folder / "ranks", configs)
    for plain, validated in zip(configs[::2], configs[1::2], strict=True):
        assert [scores["step"] for scores in said(validated.out)["scores"]] == [2, 4]
        assert said(validated.out)["scores"] == said(validated.out, 1)["scores"]
        assert said(plain.out)["losses"] == said(validated.out)["losses"]
        for name in FILES:
            file = f"checkpoints/step-{STEPS:08d}/{name}"
            assert (plain.out / file).read_bytes() == (validated.out / file).read_bytes(), (plain.out.name, name)


def test_training_does_not_notice(answering_inputs: Path, tmp_path: Path) -> None:
    check_that_training_does_not_notice(answering_inputs, tmp_path, ["zero1", "sharded zero3"])


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_does_not_notice_on_any_stage(answering_inputs: Path, tmp_path: Path, checkpointing: bool) -> None:
    stages = ["zero0", "zero1", "zero2", "zero3", "zero3_offload", "sharded zero3", "sharded zero3_offload"]
    check_that_training_does_not_notice(answering_inputs, tmp_path, stages, checkpointing)


def validate_once(configs: dict[str, RunConfig], folder: Path) -> None:
    """Validate each run's newest checkpoint before any step; every rank's scores go to FOLDER/NAME-RANK.json."""
    world, device = join()
    for name, config in configs.items():
        run = open_run(config, open_inputs(config, world), world, device)
        validator = open_validator(config, world)
        assert validator is not None
        scores = validator(run.engine, run.first_step)
        (folder / f"{name}-{world.rank}.json").write_text(json.dumps(scores.to_dict()))
    distributed.shut_down()


@pytest.fixture(scope="module")
def tuned(answering_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("tuned")
    config = answering(answering_inputs, folder / "run", max_steps=2)
    run_ranks(train_all, 1, folder / "ranks", [config])
    return dataclasses.replace(config, resume="auto")


@pytest.fixture(scope="module")
def expected(tuned: RunConfig) -> dict[int, dict[str, float | None]]:
    """What `llara-dist evaluate` says of the validation split, by how many rows (0 = all), and the training loss."""
    found = {}
    for rows in (0, 1):
        result = evaluate(tuned.out, split="val", limit=rows, max_new_tokens=12, device="cpu")
        found[rows] = {
            "hit_ratio": result["hr@1"]["value"],
            "valid_ratio": result["valid_ratio"]["value"],
            "ranked": result["ranking"]["total"]["hr@1"],
            "loss": answer_loss(tuned, rows),
            "rows": result["rows"],
        }
    assert 0 < found[0]["valid_ratio"] < 1
    assert 0 < found[0]["hit_ratio"] < found[0]["valid_ratio"]
    return found


def answer_loss(config: RunConfig, rows: int) -> float:
    """The loss as training computes it, over the first validation rows."""
    trained = load_trained(config.out, torch.device("cpu"))
    shards = ShardSet.open(config.data.shards, "val")
    samples = shards.read(np.argsort(shards.all.keys)[: rows or None])
    batch = collate(samples, [True] * len(samples))
    with torch.no_grad():
        return trained.model(batch).item() / batch.answer_tokens


@pytest.mark.parametrize("size", [*(pytest.param(size, marks=pytest.mark.long) for size in (1, 2)), 3])
def test_the_numbers_are_those_of_evaluate(
    size: int, tuned: RunConfig, expected: dict[int, dict[str, float | None]], tmp_path: Path
) -> None:
    generated = ValidationConfig(every_steps=1, batch_size=2, max_new_tokens=12)
    kinds = {
        "generated": generated,
        "ranked": dataclasses.replace(generated, generation=False),
        "one row": dataclasses.replace(generated, rows=1),
    }
    configs = {
        f"{stage}, {kind}": with_stage(dataclasses.replace(tuned, validation=settings), stage)
        for stage in ("zero1", "sharded zero3")
        for kind, settings in kinds.items()
    }
    run_ranks(validate_once, size, tmp_path / "ranks", configs, tmp_path)
    for name, config in configs.items():
        by_rank = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(size)]
        assert all(scores == by_rank[0] for scores in by_rank)
        scores, wanted = by_rank[0], expected[config.validation.rows]
        generation = config.validation.generation
        assert scores["step"] == 2
        assert scores["rows"] == wanted["rows"]
        assert scores["hit_ratio"] == pytest.approx(wanted["hit_ratio" if generation else "ranked"], abs=1e-12)
        assert scores["valid_ratio"] == (wanted["valid_ratio"] if generation else None)
        assert scores["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


LONGEST = 32


def answer(model: HybridLlama, samples: list[Sample], end: int, lockstep: Lockstep) -> dict[str, Any]:
    """Scores and generated answers of a batch, by key; the head runs in parts of a few positions."""
    candidates = np.stack([sample.candidates for sample in samples])
    answers = [np.array([700, 900, 1100, end][-1 - item % 4 :], dtype=np.uint32) for item in range(40)]
    prompts = read_prompts(model, samples, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llara_dist.evaluation.scoring._POSITIONS_PER_HEAD_CALL", 16)
        scores = score_candidates(model, prompts, candidates, answers, lockstep)
    generated = generate(model, prompts, end, LONGEST, lockstep)
    return {
        str(sample.key): {"tokens": said.tokens, "finished": said.finished, "scores": row.tolist()}
        for sample, said, row in zip(samples, generated, scores.total, strict=True)
    }


def answer_a_share(config: RunConfig, shares: list[list[int]], end: int, folder: Path) -> None:
    """Answer this rank's rows in step with the others; they go to FOLDER/RANK.json."""
    world, device = join()
    run = open_run(config, open_inputs(config, world), world, device)
    samples = ShardSet.open(config.data.shards, "val").read(shares[world.rank])
    with evaluation_mode(run.engine):
        said = answer(run.engine.model, samples, end, Lockstep(device))
    (folder / f"{world.rank}.json").write_text(json.dumps(said))
    distributed.shut_down()


@pytest.mark.long
def test_ranks_that_finish_apart_stay_in_step(answering_inputs: Path, tmp_path: Path) -> None:
    config = answering(answering_inputs, tmp_path / "run", max_steps=2)
    table = load_item_table(config.recommender.path).weight
    model = build_hybrid_llama(config.model, config.lora, config.projector, table, torch.device("cpu"), config.seed)
    model.eval()
    samples = ShardSet.open(config.data.shards, "val").read(range(6))
    endless = [said.tokens for said in generate(model, read_prompts(model, samples, True), -1, LONGEST)]
    # Titles of this world have equally many tokens: a token to which the answers come at many places ends them here.
    end = max(sorted(set(np.ravel(endless).tolist())), key=lambda token: len({places(token, said) for said in endless}))
    alone = answer(model, samples, end, ALONE)
    order = sorted(range(6), key=lambda row: places(end, endless[row]))
    shares = [order[:1], order[1:3], order[3:]]
    ends = [places(end, endless[share[-1]]) for share in shares]
    assert ends[0] < ends[1] < ends[2]
    run_ranks(answer_a_share, 3, tmp_path / "ranks", with_stage(config, "sharded zero3"), shares, end, tmp_path)
    together: dict[str, Any] = {}
    for rank in range(3):
        together |= json.loads((tmp_path / f"{rank}.json").read_text())
    assert together.keys() == alone.keys()
    for key, expected in alone.items():
        assert (together[key]["tokens"], together[key]["finished"]) == (expected["tokens"], expected["finished"])
        np.testing.assert_allclose(together[key]["scores"], expected["scores"], atol=1e-3)


def places(token: int, tokens: list[int]) -> int:
    """Where a token first stands, or behind the last."""
    return tokens.index(token) if token in tokens else len(tokens)
