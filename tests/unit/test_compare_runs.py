"""`llara-dist report`: evaluated runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llara_dist.config import RunConfig, to_dict
from llara_dist.data.predictions import Predictions, write_predictions
from llara_dist.errors import InputError
from llara_dist.evaluation.compare_runs import report

ROWS, CANDIDATES = 40, 5


def write_run(run: Path, hits: int, rows: int = ROWS, folder: str = "test-hybrid") -> Path:
    """A run and its evaluation, as far as the report reads them: the first rows are hits."""
    candidates = np.tile(np.arange(CANDIDATES, dtype=np.int32), (rows, 1))
    hit = np.arange(rows) < hits
    predictions = Predictions(
        keys=np.arange(rows, dtype=np.uint64),
        targets=np.zeros(rows, dtype=np.int32),
        candidates=candidates,
        generated=["an answer"] * rows,
        finished=np.ones(rows, dtype=bool),
        exact_valid=np.ones(rows, dtype=bool),
        exact_hit=hit,
        published_valid=np.ones(rows, dtype=bool),
        published_hit=hit,
        log_likelihoods=None,
        answer_tokens=None,
    )
    evaluation = run / "evaluation" / folder
    evaluation.mkdir(parents=True)
    write_predictions(evaluation / "predictions.parquet", predictions)
    about = {"candidates": CANDIDATES, "form": "hybrid", "checkpoint": "last", "step": 2}
    (evaluation / "metrics.json").write_text(json.dumps(about))
    (run / "config.json").write_text(json.dumps(to_dict(RunConfig())))
    steps = ({"step": step, "loss": 2.0 - step, "p": step, "hybrid_share": step} for step in range(2))
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return run


def test_runs_are_compared_with_each_other_and_with_chance(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "hybrid", 30), write_run(tmp_path / "text-only", 10)]
    result = report(runs, tmp_path / "report.html")
    pairs = [(pair["first"], pair["second"], pair["verdict"]) for pair in result["comparisons"]]
    assert pairs == [("hybrid", "text-only", "ahead"), ("hybrid", "random", "ahead")]
    assert result["arms"]["text-only"]["generated"]["hr@1"] == 0.25
    assert result["arms"]["random"]["ranked"]["hr@1"] == pytest.approx(1 / CANDIDATES)
    page = (tmp_path / "report.html").read_text()
    assert "hybrid is ahead" in page
    assert "Training loss" in page


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / seed / "run", 20) for seed in ("a", "b")]
    assert set(report(runs, tmp_path / "report.html")["arms"]) == {"random", "a/run", "b/run"}


def test_names_grow_until_no_two_are_the_same_and_none_is_a_baselines(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / place, hits) for place, hits in (("a/s/run", 30), ("b/s/run", 10), ("x/random", 20))]
    result = report(runs, tmp_path / "report.html")
    assert set(result["arms"]) == {"random", "a/s/run", "b/s/run", "x/random"}
    found = {name: arm["generated"]["hr@1"] for name, arm in result["arms"].items() if name != "random"}
    assert found == {"a/s/run": 0.75, "b/s/run": 0.25, "x/random": 0.5}
    with pytest.raises(InputError, match="given twice"):
        report([runs[0], tmp_path / "a" / ".." / "a" / "s" / "run"], tmp_path / "report.html")


def test_an_evaluation_of_the_first_rows_counts_only_where_there_is_no_whole_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3, rows=8, folder="test-hybrid-first-8")
    assert report([run], tmp_path / "report.html")["arms"]["run"]["rows"] == 8
    write_run(run, 30)
    assert report([run], tmp_path / "report.html")["arms"]["run"]["rows"] == ROWS


def test_a_run_that_was_not_evaluated_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3, folder="val-hybrid")
    with pytest.raises(InputError, match=r"/run: no evaluation of the test split; `llara-dist evaluate --run .*/run "):
        report([run], tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_runs_of_different_rows_are_refused(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "one", 3), write_run(tmp_path / "two", 3, rows=9)]
    with pytest.raises(InputError, match=r"--runs: .*holds other rows"):
        report(runs, tmp_path / "report.html")
