"""A tuned model back from a run's folder, for evaluation and export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from llara_dist.config import RunConfig, run_config_from_dict
from llara_dist.errors import InputError
from llara_dist.integrity import sha256_json
from llara_dist.model.hybrid import HybridLlama, build_hybrid_llama
from llara_dist.model.kernels import chooser, runnable
from llara_dist.model.llama import base_fingerprint
from llara_dist.recommenders.item_table import load_item_table
from llara_dist.training.checkpoints.checkpoint import (
    MARKER,
    Checkpoint,
    best_checkpoint,
    load_parameters,
    newest_checkpoint,
    open_checkpoint,
)


@dataclass(frozen=True)
class Trained:
    """A tuned model and what it was tuned with.

    Attributes:
        model: in evaluation mode, on its device; computed by the run's kernels where they can run here.
        config: of the run.
        checkpoint: which one was loaded.
    """

    model: HybridLlama
    config: RunConfig
    checkpoint: Checkpoint


def load_trained(run: Path, device: torch.device, which: Literal["last", "best"] = "last") -> Trained:
    """Load a checkpoint of a run, or one checkpoint given by its own folder.

    Args:
        run: a run's folder, or RUN/checkpoints/step-00001234.
        device: where it computes.
        which: of a run's checkpoints the newest complete one, or the best by validation.

    Raises:
        InputError: no complete or no best checkpoint, or base model or item table are not those of the run.
    """
    checkpoint = find_checkpoint(run, which)
    config = run_config_from_dict(checkpoint.state["config"])
    contract = checkpoint.state["contract"]
    item_table = load_item_table(config.recommender.path)
    if base_fingerprint(config.model) != contract["base_model"]:
        raise InputError(f"{checkpoint.path}: tuned on another base model than {config.model.path} now holds")
    if sha256_json(item_table.info["files"]) != contract["item_table"]:
        raise InputError(f"{checkpoint.path}: tuned with another item table than {config.recommender.path} now holds")
    kernels = runnable(config.kernels, chooser(config.model, device))
    model = build_hybrid_llama(
        config.model, config.lora, config.projector, item_table.weight, device, config.seed, kernels=kernels
    )
    load_parameters(model, checkpoint)
    return Trained(model.eval(), config, checkpoint)


def find_checkpoint(run: Path, which: Literal["last", "best"] = "last") -> Checkpoint:
    """The checkpoint that a run's folder, or the checkpoint's own, stands for.

    Raises:
        InputError: there is none, or the best is asked of one checkpoint's own folder.
    """
    if (run / MARKER).is_file():
        if which == "best":
            raise InputError(f"{run}: is one checkpoint already; give the run's folder for --checkpoint best")
        return open_checkpoint(run)
    folder = run / "checkpoints"
    found = newest_checkpoint(folder) if which == "last" else best_checkpoint(folder) if folder.is_dir() else None
    if found is None:
        raise InputError(f"{run}: holds no complete checkpoint; expected a folder made by `llara-dist train`")
    return found
