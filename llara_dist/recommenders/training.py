"""Train a recommender on a dataset folder's training rows, keep the best epoch, store it with its scores."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llara_dist import console
from llara_dist.data.dataset import Dataset, load_dataset
from llara_dist.distributed import World, pick_device
from llara_dist.errors import InputError
from llara_dist.hashing import permutation, text_seed
from llara_dist.recommenders.evaluation import MODELS, rank_rows, show, summarise
from llara_dist.recommenders.item_table import write_recommender
from llara_dist.recommenders.recommender import Recommender
from llara_dist.recommenders.windows import history_tensors

_ORDER = text_seed("llara_dist/recommenders/order")


def train(
    data: Path,
    out: Path,
    model: Literal["sasrec"] = "sasrec",
    epochs: int = 30,
    patience_epochs: int = 5,
    batch_size: int = 256,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    dim: int = 64,
    blocks: int = 2,
    heads: int = 2,
    dropout: float = 0.3,
    positions: Literal["last", "all"] = "last",
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "cpu",
) -> dict[str, Any]:
    """Train a sequential recommender and write its folder, the item table included.

    Training ends when the cross-entropy of the validation rows (smoother than any hit ratio on a hundred users) has
    not fallen for `patience_epochs` epochs; the best epoch is kept. The same arguments give the same bytes on a CPU
    at an equal number of threads.

    Args:
        data: dataset folder made by `llara-dist prepare`.
        out: folder to write: item_table.safetensors, weights.safetensors, recommender.json.
        model: which recommender.
        epochs: most passes over the training rows.
        patience_epochs: epochs without a lower validation loss before training ends.
        batch_size: rows of a step.
        lr: Adam's learning rate.
        weight_decay: decoupled weight decay (AdamW) of every parameter.
        dim: width of item vectors and states.
        blocks: transformer blocks.
        heads: attention heads.
        dropout: share of activations dropped while training.
        positions: what a training row predicts. "last": its target, as at evaluation, which is best where histories
            are long. "all": every item of its history as well, which learns in fewer steps where they are short.
        seed: of the initial weights, the order of rows and dropout.
        device: where to train; auto = CUDA where there is one.

    Returns:
        recommender.json as written: scores of val and test among other things.

    Raises:
        InputError: bad arguments, a damaged data set, no training rows, `out` exists, or the loss diverged.
    """
    _check(epochs, patience_epochs, batch_size, lr, weight_decay, dim, blocks, heads, dropout)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; remove it or choose another --out")
    dataset = load_dataset(Path(data))
    for split in ("train", "val", "test"):
        if not len(dataset.rows(split)):
            raise InputError(f"{dataset.path}: split {split!r} has no rows; a recommender needs all three")
    architecture = {"blocks": blocks, "heads": heads, "dropout": dropout}
    started = time.perf_counter()
    # A caller's own random state is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        recommender = MODELS[model](
            num_items=dataset.num_items, max_history=dataset.max_history, dim=dim, **architecture
        ).to(pick_device(device, World()))
        curve = _fit(recommender, dataset, epochs, patience_epochs, batch_size, lr, weight_decay, positions, seed)
    recommender = recommender.cpu()
    scores = {split: summarise(rank_rows(recommender, dataset, split)) for split in ("val", "test")}
    info = write_recommender(
        out,
        recommender,
        {
            "model": model,
            "dataset_hash": dataset.hash,
            "max_history": dataset.max_history,
            "architecture": architecture,
            "config": {
                "epochs": epochs,
                "patience_epochs": patience_epochs,
                "batch_size": batch_size,
                "lr": lr,
                "weight_decay": weight_decay,
                "positions": positions,
                "seed": seed,
            },
            "best_epoch": min(range(len(curve)), key=lambda epoch: curve[epoch]["val_loss"]),
            "curve": curve,
            "scores": scores,
        },
    )
    show(f"{model} after {len(curve)} epochs, {time.perf_counter() - started:.0f} s → {out}", scores)
    return info


def _check(
    epochs: int,
    patience_epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    dim: int,
    blocks: int,
    heads: int,
    dropout: float,
) -> None:
    counts = {
        "epochs": epochs,
        "patience_epochs": patience_epochs,
        "batch_size": batch_size,
        "dim": dim,
        "blocks": blocks,
        "heads": heads,
    }
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"--{name} {value}: must be at least 1")
    if dim % heads:
        raise InputError(f"--heads {heads}: must divide --dim {dim}")
    if not 0.0 <= dropout < 1.0:
        raise InputError(f"--dropout {dropout}: must be at least 0 and below 1")
    if not (lr > 0.0 and math.isfinite(lr)) or not (weight_decay >= 0.0 and math.isfinite(weight_decay)):
        raise InputError(f"--lr {lr} must be above 0 and --weight_decay {weight_decay} at least 0, both finite")


def _fit(
    recommender: Recommender,
    dataset: Dataset,
    epochs: int,
    patience_epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    positions: Literal["last", "all"],
    seed: int,
) -> list[dict[str, float]]:
    """Train in place and leave the best epoch's weights; returns loss and validation scores by epoch."""
    device = next(recommender.parameters()).device
    rows = dataset.train
    histories, lengths = history_tensors(rows.offsets, rows.items, recommender.max_history, recommender.num_items)
    targets = torch.from_numpy(rows.targets.astype("int64"))
    optimizer = torch.optim.AdamW(recommender.parameters(), lr=lr, weight_decay=weight_decay)
    curve: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    best_epoch, lowest = 0, math.inf
    for epoch in range(epochs):
        recommender.train()
        order = torch.from_numpy(permutation(len(rows), _ORDER, seed, epoch))
        losses = []
        for batch in console.progress(order.split(batch_size), f"epoch {epoch + 1} of at most {epochs}"):
            inputs = (tensor[batch].to(device) for tensor in (histories, lengths, targets))
            loss = recommender.loss(*inputs, every_position=positions == "all")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        mean_loss = torch.stack(losses).mean().item()
        if not math.isfinite(mean_loss):
            raise InputError(f"--lr {lr}: the loss of epoch {epoch + 1} is {mean_loss}; choose a smaller one")
        ranks = rank_rows(recommender, dataset, "val")
        val_loss = float(ranks.losses.mean())
        hits = float(ranks.candidate_hits().mean())
        curve.append({"loss": mean_loss, "val_loss": val_loss, "val_candidate_hr@1": hits})
        console.say(
            f"epoch {epoch + 1}: loss {mean_loss:.4f}, validation loss {val_loss:.4f}, HR@1 among candidates {hits:.4f}"
        )
        if val_loss < lowest:
            best_epoch, lowest, best = epoch, val_loss, copy.deepcopy(recommender.state_dict())
        elif epoch - best_epoch >= patience_epochs:
            break
    recommender.load_state_dict(best)
    return curve
