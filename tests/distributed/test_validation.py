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
from llara_dist.evaluation.evaluate import evaluate
from llara_dist.evaluation.validation import open_validator
from llara_dist.stream.batch import collate
from llara_dist.stream.reader import ShardSet
from llara_dist.training.preflight import open_inputs
from llara_dist.training.run import open_run
from llara_dist.training.trained import load_trained
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


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.long), 3])
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
