"""Evaluation of a real (two-step) run on a small world, from shards to predictions and metrics."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llara_dist.config import DataConfig, ModelConfig, RecommenderConfig, RunConfig
from llara_dist.data.build import build
from llara_dist.data.inspect import shown_titles
from llara_dist.data.predictions import read_predictions, write_predictions
from llara_dist.data.tokenizer import load_tokenizer
from llara_dist.distributed import World
from llara_dist.errors import InputError
from llara_dist.evaluation.answers import answer_text, answer_tokens, check_answer
from llara_dist.evaluation.evaluate import default_folder, evaluate, form_is_hybrid, summarise
from llara_dist.evaluation.predict import join_rows, predict
from llara_dist.recommenders.training import train as train_recommender
from llara_dist.stream.reader import ShardSet
from llara_dist.training.checkpoints import trained as trained_runs
from llara_dist.training.checkpoints.best import write_best
from llara_dist.training.checkpoints.trained import load_trained
from llara_dist.training.scores import ValidationScores
from tests.distributed.ranks import run_ranks
from tests.distributed.training import train_all
from tests.tiny import write_llama
from tests.unit.worlds import byte_level, sentencepiece_folder, write_world

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, llm, rec, shards and a run of two steps."""
    root = tmp_path_factory.mktemp("tuned")
    write_world(root / "data", num_users=120)
    tokenizer = byte_level()
    write_llama(root / "llm", vocabulary=len(tokenizer))
    tokenizer.save_pretrained(root / "llm")
    build(root / "data", str(root / "llm"), root / "shards", processes=1)
    train_recommender(root / "data", root / "rec", epochs=1, dim=16, heads=2)
    config = RunConfig(
        model=ModelConfig(path=str(root / "llm"), bits=32),
        recommender=RecommenderConfig(root / "rec"),
        data=DataConfig(shards=str(root / "shards"), max_steps=2, global_batch_samples=8, workers=0),
        deepspeed=REPOSITORY / "ds_configs" / "zero0.json",
        out=root / "run",
        device="cpu",
    )
    # In a process of its own: DeepSpeed keeps the process group of the first engine of a process.
    run_ranks(train_all, 1, root / "ranks", [config])
    return root


@pytest.fixture(scope="module")
def result(tuned: Path) -> dict:
    return evaluate(tuned / "run", max_new_tokens=10, device="cpu")


def test_what_is_returned_is_what_is_written(tuned: Path, result: dict) -> None:
    folder = tuned / "run" / "evaluation" / "test-hybrid"
    assert result["out"] == str(folder)
    written = json.loads((folder / "metrics.json").read_text())
    assert written == {name: value for name, value in result.items() if name != "out"}
    assert result["rows"] == result["rows_in_split"] == 12
    assert result["candidates"] == 20
    assert result["hr@1"] == result["protocols"]["exact"]["hr@1"]
    assert set(result["ranking"]["total"]) == {f"hr@{k}" for k in (1, 3, 5, 10)} | {
        "ndcg@3",
        "ndcg@5",
        "ndcg@10",
        "hr@1_interval",
    }


def test_predictions_hold_every_row_with_its_frozen_candidates(tuned: Path, result: dict) -> None:
    from llara_dist.data.dataset import load_dataset

    data = load_dataset(tuned / "data")
    predictions = read_predictions(Path(result["out"]) / "predictions.parquet")
    assert np.array_equal(predictions.keys, data.test.keys)
    assert np.array_equal(predictions.targets, data.test.targets)
    assert np.array_equal(predictions.candidates, data.candidates["test"])
    assert np.array_equal(
        predictions.candidates[np.arange(len(predictions)), predictions.target_index], predictions.targets
    )
    assert summarise(predictions, "exact") == {
        name: result[name] for name in ("valid_ratio", "hr@1", "hr@1_valid", "finished_ratio", "protocols", "ranking")
    }


def test_metrics_depend_neither_on_the_batch_size_nor_on_the_number_of_ranks(tuned: Path, result: dict) -> None:
    trained = load_trained(tuned / "run", torch.device("cpu"))
    shards = ShardSet.open(tuned / "shards", "test")
    ids = np.argsort(shards.all.keys)
    whole = read_predictions(Path(result["out"]) / "predictions.parquet")
    tokenizer, titles = load_tokenizer(tuned / "llm"), shown_titles(tuned / "shards")
    for size, batch_size in ((1, 1), (1, 5), (3, 2), (13, 4)):
        parts = []
        for rank in range(size):
            if rank >= len(ids):
                continue
            part, _ = predict(
                trained.model,
                shards,
                ids,
                tokenizer,
                titles,
                hybrid=True,
                batch_size=batch_size,
                max_new_tokens=10,
                world=World(rank=rank, size=size),
            )
            parts.append(part)
        keys = np.concatenate([part.keys for part in parts])
        order = np.argsort(keys)
        assert np.array_equal(keys[order], whole.keys)
        generated = [text for part in parts for text in part.generated or []]
        assert [generated[place] for place in order] == whole.generated
        scores = np.concatenate([part.log_likelihoods for part in parts if part.log_likelihoods is not None])[order]
        np.testing.assert_allclose(scores, whole.log_likelihoods, atol=2e-4)


def test_a_run_of_kernels_that_cannot_run_here_is_loaded_with_what_can(
    tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = trained_runs.find_checkpoint(tuned / "run")
    kernels = {"attention": "flash2", "projector": "triton", "lora": "peft", "layers": "liger", "compile": True}
    config = found.state["config"] | {"kernels": found.state["config"]["kernels"] | kernels}
    elsewhere = dataclasses.replace(found, state=found.state | {"config": config})
    monkeypatch.setattr(trained_runs, "find_checkpoint", lambda *_: elsewhere)
    chosen = load_trained(tuned / "run", torch.device("cpu")).model.kernels
    assert (chosen.attention, chosen.projector, chosen.layers, chosen.compile) == ("sdpa", "eager", "torch", False)
    assert chosen.lora == "peft"  # which runs anywhere
    assert capsys.readouterr().out.splitlines() == [
        "kernels.attention=flash2: no GPU; sdpa computes instead",
        "kernels.projector=triton: no GPU; eager computes instead",
        "kernels.layers=liger: no GPU; torch computes instead",
    ]


def test_the_best_checkpoint_is_evaluated_apart_from_the_last(tuned: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tuned / "run", tmp_path / "run")
    with pytest.raises(InputError, match=r"best.json: not found.*did not validate.*use --checkpoint last"):
        evaluate(run, checkpoint="best", device="cpu")
    write_best(run / "checkpoints", ValidationScores(step=2, hit_ratio=0.5, loss=1.0))
    best = evaluate(run, checkpoint="best", generation=False, limit=3, device="cpu")
    assert (best["checkpoint"], best["step"]) == ("best", 2)
    assert best["out"] == str(run / "evaluation" / "test-hybrid-best-first-3")


def test_hybrid_and_text_forms_differ_and_do_not_overwrite_each_other(tuned: Path, result: dict) -> None:
    text = evaluate(tuned / "run", form="text", generation=False, device="cpu")
    assert text["form"] == "text"
    assert text["out"] != result["out"]
    assert "hr@1" not in text
    assert "protocols" not in text
    scores = [read_predictions(Path(r["out"]) / "predictions.parquet").log_likelihoods for r in (text, result)]
    assert not np.allclose(scores[0], scores[1], atol=1e-3)
    assert read_predictions(Path(text["out"]) / "predictions.parquet").generated is None


def test_limit_takes_the_first_rows_by_key(tuned: Path, result: dict) -> None:
    few = evaluate(tuned / "run", limit=3, ranking=False, max_new_tokens=10, device="cpu")
    predictions = read_predictions(Path(few["out"]) / "predictions.parquet")
    whole = read_predictions(Path(result["out"]) / "predictions.parquet")
    assert few["rows"] == 3
    assert few["rows_in_split"] == 12
    assert predictions.generated == (whole.generated or [])[:3]
    assert predictions.log_likelihoods is None


def test_a_checkpoint_may_be_named_and_stays_as_it_was(tuned: Path, result: dict) -> None:
    checkpoint = tuned / "run" / "checkpoints" / "step-00000002"
    files = sorted(checkpoint.iterdir())
    again = evaluate(checkpoint, max_new_tokens=10, protocol="published", device="cpu")
    assert sorted(checkpoint.iterdir()) == files
    assert again["protocols"] == result["protocols"]
    assert again["hr@1"] == result["protocols"]["published"]["hr@1"]
    assert Path(again["out"]) == tuned / "run" / "evaluation" / "test-hybrid-step-00000002"


def test_bad_input_has_one_clear_line_and_writes_nothing(tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        evaluate(tmp_path, out=out)
    with pytest.raises(InputError, match="--batch_size 0"):
        evaluate(tuned / "run", batch_size=0, out=out)
    with pytest.raises(InputError, match="nothing is left to evaluate"):
        evaluate(tuned / "run", generation=False, ranking=False, out=out)
    with pytest.raises(InputError, match=r"nowhere"):
        evaluate(tuned / "run", shards=str(tmp_path / "nowhere"), out=out)
    build(tuned / "data", str(_other_tokenizer(tmp_path / "spm")), tmp_path / "shards", processes=1)
    with pytest.raises(InputError, match="tokenizer"):
        evaluate(tuned / "run", shards=str(tmp_path / "shards"), out=out)
    assert not out.exists()


def test_only_an_earlier_evaluation_is_replaced(tuned: Path, result: dict, tmp_path: Path) -> None:
    run = shutil.copytree(tuned / "run", tmp_path / "run")
    before = sorted(run.rglob("*"))
    (tmp_path / "file").touch()
    for out in (run, run / "checkpoints", tmp_path / "file"):
        with pytest.raises(InputError, match="is no evaluation's folder"):
            evaluate(run, out=out, device="cpu")
    assert sorted(run.rglob("*")) == before
    for _ in range(2):
        evaluate(run, out=tmp_path / "out", generation=False, limit=1, device="cpu")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"predictions.parquet", "metrics.json"}


def _other_tokenizer(folder: Path) -> Path:
    byte_level(vocabulary=500).save_pretrained(folder)
    return folder


def test_a_damaged_checkpoint_is_not_evaluated(tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned / "run" / "checkpoints" / "step-00000002", tmp_path / "step")
    weights = tmp_path / "step" / "projector.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(InputError, match="damaged"):
        evaluate(tmp_path / "step", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_form_follows_the_curriculum_unless_told() -> None:
    config = RunConfig()
    assert form_is_hybrid("auto", config)
    never = dataclasses.replace(config.curriculum, schedule="constant", probability=0.0)
    assert not form_is_hybrid("auto", dataclasses.replace(config, curriculum=never))
    assert form_is_hybrid("hybrid", dataclasses.replace(config, curriculum=never))
    assert not form_is_hybrid("text", config)


def test_partial_results_have_a_folder_of_their_own(tmp_path: Path) -> None:
    assert default_folder(tmp_path, "val", True, 5) == tmp_path / "evaluation" / "val-hybrid-first-5"


@pytest.mark.parametrize("family", ["byte level", "sentencepiece"])
def test_answers_are_what_the_shards_teach_and_read_back_as_titles(family: str, tmp_path: Path) -> None:
    if family == "byte level":
        byte_level().save_pretrained(tmp_path / "tokenizer")
    else:
        sentencepiece_folder(tmp_path / "tokenizer")
    write_world(tmp_path / "data")
    build(tmp_path / "data", str(tmp_path / "tokenizer"), tmp_path / "shards", processes=1)
    tokenizer, titles = load_tokenizer(tmp_path / "tokenizer"), shown_titles(tmp_path / "shards")
    answers = answer_tokens(tokenizer, titles)
    shards = ShardSet.open(tmp_path / "shards", "train")
    for sample in shards.read(range(len(shards))):
        check_answer(sample, answers)
    assert {int(answer[-1]) for answer in answers} == {tokenizer.eos_token_id}
    for title, answer in zip(titles, answers, strict=True):
        assert answer_text(tokenizer, answer.tolist()) == title
    sample = shards.read([0])[0]
    with pytest.raises(InputError, match=f"key {sample.key}: its answer is not item {sample.target}'s title"):
        check_answer(sample, answers[1:] + answers[:1])


def test_predictions_come_back_as_written(tuned: Path, result: dict, tmp_path: Path) -> None:
    predictions = read_predictions(Path(result["out"]) / "predictions.parquet")
    write_predictions(tmp_path / "again.parquet", predictions)
    again = read_predictions(tmp_path / "again.parquet")
    for field in dataclasses.fields(predictions):
        assert np.array_equal(getattr(predictions, field.name), getattr(again, field.name)), field.name
    with pytest.raises(InputError, match="not found"):
        read_predictions(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_predictions(tmp_path / "text.parquet")


def test_verdicts_are_judged_on_shown_titles() -> None:
    from llara_dist.evaluation.predict import RowResult

    titles = ["Alien", "Aliens", "Heat"]
    rows = [
        RowResult(key, target, np.array([0, 1, 2], np.int32), text, True, None, None)
        for key, (target, text) in enumerate([(1, "aliens"), (0, "Alien 3"), (2, "Heat"), (2, "Alien")])
    ]
    predictions = join_rows(rows, titles)
    assert predictions.exact_hit is not None
    assert predictions.published_hit is not None
    assert predictions.exact_hit.tolist() == [True, False, True, False]
    assert predictions.published_hit.tolist() == [False, True, True, False]
    summary = summarise(predictions, "published")
    assert summary["hr@1"]["value"] == 0.5
    assert summary["protocols"]["exact"]["valid_ratio"]["value"] == 0.75
