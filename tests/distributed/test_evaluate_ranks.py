"""Evaluation on several ranks gives the metrics and predictions of one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from llara_dist.data.predictions import read_predictions
from llara_dist.evaluation.evaluate import evaluate
from tests.distributed.ranks import run_ranks
from tests.distributed.training import train_all
from tests.runs import run_config


def evaluate_into(run: Path, out: Path) -> None:
    evaluate(run, batch_size=3, max_new_tokens=8, device="cpu", out=out)


@pytest.mark.long
def test_the_number_of_ranks_changes_no_metric(inputs: Path, tmp_path: Path) -> None:
    config = run_config(inputs, tmp_path / "run", max_steps=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, bits=32))
    run_ranks(train_all, 1, tmp_path / "train", [config])
    evaluate_into(tmp_path / "run", tmp_path / "one")
    run_ranks(evaluate_into, 2, tmp_path / "ranks", tmp_path / "run", tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert (one.pop("timing")["ranks"], two.pop("timing")["ranks"]) == (1, 2)
    assert one == two
    first, second = (read_predictions(tmp_path / name / "predictions.parquet") for name in ("one", "two"))
    assert np.array_equal(first.keys, second.keys)
    assert first.generated == second.generated
    assert first.log_likelihoods is not None
    assert second.log_likelihoods is not None
    np.testing.assert_allclose(first.log_likelihoods, second.log_likelihoods, atol=1e-4)
