"""`llara-dist evaluate`: a tuned run's answers and rankings on validation or test, on any number of ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llara_dist import console, distributed
from llara_dist.config import RunConfig
from llara_dist.data.predictions import Predictions, write_predictions
from llara_dist.data.tokenizer import load_tokenizer
from llara_dist.errors import InputError
from llara_dist.evaluation.decode import MAX_NEW_TOKENS
from llara_dist.evaluation.metrics import PROTOCOLS, Protocol, answer_metrics, proportion
from llara_dist.evaluation.predict import predict
from llara_dist.integrity import staged_folder, write_json
from llara_dist.recommenders.item_table import load_item_table
from llara_dist.recommenders.ranking import rank_targets, ranking_scores
from llara_dist.stream.locations import node_cache, open_samples, parts_of
from llara_dist.stream.reader import Samples
from llara_dist.training.checkpoints.trained import load_trained
from llara_dist.training.preflight.consistency import check_language_model, check_recommender

HR_AT = (1, 3, 5, 10)
NDCG_AT = (3, 5, 10)
FILES = ("predictions.parquet", "metrics.json")
"""what an evaluation's folder holds"""


def evaluate(
    run: Path,
    split: Literal["val", "test"] = "test",
    protocol: Protocol = "exact",
    form: Literal["auto", "hybrid", "text"] = "auto",
    generation: bool = True,
    ranking: bool = True,
    limit: int = 0,
    batch_size: int = 16,
    max_new_tokens: int = MAX_NEW_TOKENS,
    checkpoint: Literal["last", "best"] = "last",
    shards: str | None = None,
    source: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: Path | None = None,
) -> dict[str, Any]:
    """Generate an answer for every row and rank its candidates; write predictions and metrics.

    Both protocols are judged and stored; `protocol` says which one is the result. Every rate comes with its 95 %
    bootstrap interval. The metrics depend neither on the batch size nor on the number of ranks.

    Args:
        run: a run's folder, or one of its checkpoints (RUN/checkpoints/step-00001234).
        split: which rows; their candidates are frozen in the dataset folder.
        protocol: exact = the normalised answer is a candidate's title; published = LLaRA's substring metric.
        form: hybrid = behaviour embeddings after the titles; text = titles alone; auto = text for a run that never
            saw a behaviour embedding (curriculum constant at 0), else hybrid.
        generation: whether to generate answers freely.
        ranking: whether to rank the candidates by likelihood.
        limit: evaluate only the first rows by key; 0 = all.
        batch_size: rows a rank computes at once.
        max_new_tokens: the longest answer, EOS included.
        checkpoint: of a run's folder the newest complete checkpoint, or the best by validation.
        shards: the run's shards, if they no longer lie where it was trained.
        source: of a run on a mixture, the data set whose rows are evaluated; all by default.
        device: auto, cpu or cuda.
        out: folder for predictions.parquet and metrics.json, which replaces an earlier evaluation but nothing else;
            default RUN/evaluation/SPLIT-FORM[-SOURCE][-best].

    Returns:
        metrics.json: "valid_ratio", "hr@1" (over all rows), "hr@1_valid" (over valid rows), "protocols", "ranking"
        by "total" and "per_token" log-likelihood, "timing" and what it was measured on.

    Raises:
        InputError: bad arguments, no complete or no best checkpoint, or shards, model and recommender that do not fit.
    """
    if batch_size < 1 or max_new_tokens < 1 or limit < 0:
        raise InputError(
            f"--batch_size {batch_size} and --max_new_tokens {max_new_tokens} must be at least 1, "
            f"--limit {limit} at least 0"
        )
    if not (generation or ranking):
        raise InputError("--generation false and --ranking false: nothing is left to evaluate")
    if out is not None:
        check_replaceable(Path(out))
    world = distributed.read_world()
    target_device = distributed.pick_device(device, world)
    trained = load_trained(Path(run), target_device, checkpoint)
    config = trained.config
    if shards is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, shards=shards))
    opened = open_samples(config.data.shards, split, node_cache(config.data))
    check_language_model(config, opened)
    check_recommender(config, opened, load_item_table(config.recommender.path))
    hybrid = form_is_hybrid(form, config)
    ids = rows_of(opened, source)[: limit or None]
    if world.size > 1:
        distributed.initialise(world, target_device)
    try:
        predictions, timing = predict(
            trained.model,
            opened,
            ids,
            load_tokenizer(config.model.path, config.model.revision),
            opened.titles(),
            hybrid=hybrid,
            generation=generation,
            ranking=ranking,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            world=world,
        )
    finally:
        if world.size > 1:
            distributed.shut_down()
    result = {
        "run": str(run),
        "checkpoint": checkpoint,
        "step": trained.checkpoint.step,
        "split": split,
        "form": "hybrid" if hybrid else "text",
        "rows": len(predictions),
        "rows_in_split": len(opened),
        "candidates": int(predictions.candidates.shape[1]),
        "shards": opened.hash,
        "protocol": protocol,
        **summarise(predictions, protocol),
        "timing": timing | {"ranks": world.size, "batch_size": batch_size, "device": target_device.type},
    }
    if world.is_main:
        folder = Path(out) if out is not None else default_folder(Path(run), split, hybrid, limit, source, checkpoint)
        with staged_folder(folder, replace=True) as staging:
            write_predictions(staging / "predictions.parquet", predictions)
            write_json(staging / "metrics.json", result)
        result["out"] = str(folder)
        show(result)
    return result


def rows_of(opened: Samples, source: str | None) -> np.ndarray:
    """Ids of the rows to evaluate, in the order of keys, int64 [n].

    Raises:
        InputError: no such source, or sources that show different numbers of candidates at once.
    """
    parts = parts_of(opened)
    names = [part.info["dataset"]["name"] for part in parts]
    if source is not None and source not in names:
        raise InputError(f"--source {source}: not one of {', '.join(names)}")
    widths = {part.info["recipe"]["num_candidates"] for part in parts}
    if source is None and len(widths) > 1:
        raise InputError(
            f"{'+'.join(names)}: rows of {' and '.join(str(width) for width in sorted(widths))} candidates; evaluate "
            f"one data set at a time: --source {names[0]}"
        )
    ids = np.argsort(opened.all.keys, kind="stable")
    ends = np.cumsum([len(part) for part in parts])
    return ids if source is None else ids[np.searchsorted(ends, ids, side="right") == names.index(source)]


def check_replaceable(out: Path) -> None:
    """Refuse to put results in the place of anything but nothing, an empty folder or an earlier evaluation.

    Raises:
        InputError: `out` is a file, or holds what no evaluation wrote.
    """
    if out.exists() and (not out.is_dir() or any(path.name not in FILES for path in out.iterdir())):
        raise InputError(f"{out}: exists and is no evaluation's folder; choose another --out")


def form_is_hybrid(form: Literal["auto", "hybrid", "text"], config: RunConfig) -> bool:
    """Whether rows are evaluated in the hybrid form; "auto" takes the form that tuning ended with."""
    if form != "auto":
        return form == "hybrid"
    return not (config.curriculum.schedule == "constant" and config.curriculum.probability == 0.0)


def default_folder(
    run: Path, split: str, hybrid: bool, limit: int, source: str | None = None, checkpoint: str = "last"
) -> Path:
    """Where results go unless told: beside the checkpoints, never inside one, partial results apart from whole ones."""
    name = f"{split}-{'hybrid' if hybrid else 'text'}" + (f"-{source}" if source else "")
    name += "-best" if checkpoint == "best" else ""
    if (run / "complete.json").is_file():
        name, run = f"{name}-{run.name}", run.parent.parent
    return run / "evaluation" / (f"{name}-first-{limit}" if limit else name)


def _given(value: np.ndarray | None) -> np.ndarray:
    assert value is not None
    return value


def summarise(predictions: Predictions, protocol: Protocol) -> dict[str, Any]:
    """Metrics of predictions: the protocol's answer metrics on top, "protocols" with all, "ranking" by likelihood."""
    result: dict[str, Any] = {}
    if predictions.generated is not None:
        protocols = {
            name: answer_metrics(
                _given(getattr(predictions, f"{name}_valid")), _given(getattr(predictions, f"{name}_hit"))
            )
            for name in PROTOCOLS
        }
        finished = float(_given(predictions.finished).mean())
        result |= {**protocols[protocol], "finished_ratio": finished, "protocols": protocols}
    if predictions.log_likelihoods is not None:
        ranking = {}
        for name, scores in likelihood_scores(predictions).items():
            ranks = rank_targets(scores, predictions.target_index)
            metrics = ranking_scores(ranks, HR_AT, NDCG_AT)
            ranking[name] = metrics | {"hr@1_interval": proportion(ranks.hits(1))["interval"]}
        result["ranking"] = ranking
    return result


def likelihood_scores(predictions: Predictions) -> dict[str, np.ndarray]:
    """Candidates' scores float64 [n, C]: "total" log-likelihood, and "per_token", fair to long titles."""
    total = _given(predictions.log_likelihoods)
    return {"total": total, "per_token": total / _given(predictions.answer_tokens)}


def show(result: dict[str, Any]) -> None:
    """Print an evaluation's metrics for people."""

    def cell(value: float | None, interval: list[float] | None) -> list[str]:
        return (
            ["–", "–"]
            if value is None or interval is None
            else [f"{value:.4f}", f"{interval[0]:.3f} … {interval[1]:.3f}"]
        )

    lines = []
    for name, metrics in result.get("protocols", {}).items():
        for metric in ("valid_ratio", "hr@1", "hr@1_valid"):
            values = metrics[metric]
            mark = " ←" if name == result["protocol"] else ""
            label = {"valid_ratio": "ValidRatio", "hr@1": "HR@1, all rows", "hr@1_valid": "HR@1, valid rows"}[metric]
            lines.append(
                [f"generated, {name}{mark}", label, *cell(values["value"], values["interval"]), values["rows"]]
            )
    for name, metrics in result.get("ranking", {}).items():
        label = f"likelihood, {name.replace('_', ' ')}"
        lines.append([label, "HR@1", *cell(metrics["hr@1"], metrics["hr@1_interval"]), result["rows"]])
        lines.append([label, "NDCG@5", f"{metrics['ndcg@5']:.4f}", "–", result["rows"]])
    title = f"{result['run']}, step {result['step']}: {result['split']}, {result['form']} → {result['out']}"
    console.table(title, ["answers", "metric", "value", "95 % interval", "rows"], lines)
