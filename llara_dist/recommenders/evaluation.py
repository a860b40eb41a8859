"""A recommender's scores: the target's rank among all items and among the frozen candidates of each row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from llara_dist import console
from llara_dist.data.dataset import Dataset, load_dataset
from llara_dist.errors import InputError
from llara_dist.recommenders.bootstrap import bootstrap_interval
from llara_dist.recommenders.item_table import WEIGHTS_FILE, read_info, read_tensors
from llara_dist.recommenders.published import load_published
from llara_dist.recommenders.ranking import Ranks, rank_targets, ranking_scores
from llara_dist.recommenders.recommender import Recommender
from llara_dist.recommenders.sasrec import SASRec
from llara_dist.recommenders.windows import history_tensors

HR_AT = (1, 5, 10, 20)
NDCG_AT = (5, 10, 20)
MODELS: dict[str, type[Recommender]] = {"sasrec": SASRec}


@dataclass(frozen=True)
class RowRanks:
    """Every row's ranks; what a report compares row by row.

    Fields:
        keys: uint64 [n].
        full: the target among all items, nothing left out (not even the history).
        candidates: the target among the row's frozen candidates; None for the training split, which has none.
        losses: float64 [n], cross-entropy of the target over all items, in nats.
    """

    keys: np.ndarray
    full: Ranks
    candidates: Ranks | None
    losses: np.ndarray

    def candidate_hits(self) -> np.ndarray:
        """HR@1 over the candidates by row, float64 [n].

        Raises:
            ValueError: the split has no frozen candidates.
        """
        if self.candidates is None:
            raise ValueError("the training split has no frozen candidates")
        return self.candidates.hits(1)


@torch.no_grad()
def rank_rows(recommender: Recommender, data: Dataset, split: str, batch_size: int = 1024) -> RowRanks:
    """Rank every row's target of one split, in the rows' order.

    Args:
        recommender: put into evaluation mode for the call.
        data: the dataset folder.
        split: "train", "val" or "test".
        batch_size: rows scored at once; does not change the result.

    Raises:
        InputError: the split has no rows.
    """
    rows = data.rows(split)
    if not len(rows):
        raise InputError(f"{data.path}: split {split!r} has no rows to rank")
    device = next(recommender.parameters()).device
    histories, lengths = history_tensors(rows.offsets, rows.items, recommender.max_history, recommender.num_items)
    shown = data.candidates.get(split)
    full, among, losses = [], [], []
    was_training = recommender.training
    recommender.eval()
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        logits = recommender.scores(histories[part].to(device), lengths[part].to(device)).float().cpu()
        scores, targets = logits.numpy(), rows.targets[part].astype(np.int64)
        full.append(rank_targets(scores, targets))
        losses.append(nn.functional.cross_entropy(logits, torch.from_numpy(targets), reduction="none").double().numpy())
        if shown is not None:
            candidates = shown[part].astype(np.int64)
            places = (candidates == targets[:, None]).argmax(axis=1)
            among.append(rank_targets(np.take_along_axis(scores, candidates, axis=1), places))
    recommender.train(was_training)
    return RowRanks(
        keys=rows.keys,
        full=_joined(full),
        candidates=_joined(among) if among else None,
        losses=np.concatenate(losses),
    )


def _joined(parts: list[Ranks]) -> Ranks:
    return Ranks(np.concatenate([part.above for part in parts]), np.concatenate([part.tied for part in parts]))


def summarise(ranks: RowRanks) -> dict[str, Any]:
    """Scores of one split: `full` (HR@k, NDCG@k over all items) and `candidates` (HR@1, its 95 % interval)."""
    result: dict[str, Any] = {"rows": len(ranks.full), "full": ranking_scores(ranks.full, HR_AT, NDCG_AT)}
    if ranks.candidates is not None:
        hits = ranks.candidate_hits()
        result["candidates"] = {"hr@1": float(hits.mean()), "hr@1_interval": list(bootstrap_interval(hits))}
    return result


def load_recommender(path: Path, data: Dataset | None = None) -> tuple[Recommender, dict[str, Any]]:
    """Load a trained recommender's folder or a published ``.npz``, in evaluation mode.

    Args:
        path: the folder or file.
        data: the data set it is to be used on, checked where given.

    Returns:
        The model and its `recommender.json` (for a published file: model, num_items, dim alone).

    Raises:
        InputError: missing or damaged, of an unknown model, or trained on another data set.
    """
    path = Path(path)
    if path.suffix == ".npz":
        recommender: Recommender = load_published(path)
        info: dict[str, Any] = {"model": type(recommender).__name__, "dim": recommender.dim}
    else:
        info = read_info(path)
        if info.get("model") not in MODELS:
            raise InputError(f"{path}: model {info.get('model')!r} is not known; this release has {', '.join(MODELS)}")
        if data is not None and info.get("dataset_hash") != data.hash:
            raise InputError(
                f"{path}: trained on data set {str(info.get('dataset_hash'))[:12]}, but {data.path} is "
                f"{data.hash[:12]}; train a recommender on this data set"
            )
        try:
            recommender = MODELS[info["model"]](
                num_items=info["num_items"], max_history=info["max_history"], dim=info["dim"], **info["architecture"]
            )
            recommender.load_state_dict(read_tensors(path, WEIGHTS_FILE, info))
        except (KeyError, TypeError, RuntimeError) as error:
            raise InputError(
                f"{path}: recommender.json and weights do not fit ({' '.join(str(error).split())})"
            ) from None
    if data is not None and recommender.num_items != data.num_items:
        raise InputError(
            f"{path}: knows {recommender.num_items} items, {data.path} has {data.num_items}; it is of another data set"
        )
    return recommender.eval(), info


def evaluate(data: Path, weights: Path, split: Literal["val", "test"] = "test") -> dict[str, Any]:
    """Score a recommender on a split: full ranking, and HR@1 over each row's frozen candidates.

    Args:
        data: dataset folder made by `llara-dist prepare`.
        weights: recommender folder, or a published .npz.
        split: which rows.

    Returns:
        split, model, and what `summarise` gives.

    Raises:
        InputError: a file is missing or damaged, or the recommender is of another data set.
    """
    dataset = load_dataset(Path(data))
    recommender, info = load_recommender(Path(weights), dataset)
    result = {"model": info["model"], "split": split, **summarise(rank_rows(recommender, dataset, split))}
    show(f"{info['model']} on {dataset.info.get('name', dataset.path)}", {split: result})
    return result


def show(title: str, splits: dict[str, dict[str, Any]]) -> None:
    """Print the scores of one or more splits as a table for people."""

    metrics = ("hr@1", "hr@5", "hr@10", "hr@20", "ndcg@10")

    def row(name: str, scores: dict[str, Any]) -> list[str]:
        low, high = scores["candidates"]["hr@1_interval"]
        among = [f"{scores['candidates']['hr@1']:.4f}", f"{low:.3f} … {high:.3f}"]
        return [name, str(scores["rows"]), *[f"{scores['full'][metric]:.4f}" for metric in metrics], *among]

    columns = ["", "rows", *[metric.upper() for metric in metrics], "candidates HR@1", "95 %"]
    console.table(title, columns, [row(name, scores) for name, scores in splits.items()])
