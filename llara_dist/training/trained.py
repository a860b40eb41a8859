"""A tuned model back from a run's folder, for evaluation and export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llara_dist.config import RunConfig, run_config_from_dict
from llara_dist.errors import InputError
from llara_dist.integrity import sha256_json
from llara_dist.model.hybrid import HybridLlama, build_hybrid_llama
from llara_dist.model.llama import base_fingerprint
from llara_dist.recommenders.item_table import load_item_table
from llara_dist.training.checkpoint import Checkpoint, load_parameters, newest_checkpoint, open_checkpoint


@dataclass(frozen=True)
class Trained:
    """A tuned model and what it was tuned with.

    Attributes:
        model: in evaluation mode, on its device.
        config: of the run.
        checkpoint: which one was loaded.
    """

    model: HybridLlama
    config: RunConfig
    checkpoint: Checkpoint


def load_trained(run: Path, device: torch.device) -> Trained:
    """Load the newest complete checkpoint of a run, or one checkpoint given by its own folder.

    Args:
        run: a run's folder, or RUN/checkpoints/step-00001234.
        device: where it computes.

    Raises:
        InputError: no complete checkpoint, or base model or item table are not those of the run.
    """
    if (run / "complete.json").is_file():
        checkpoint = open_checkpoint(run)
    else:
        found = newest_checkpoint(run / "checkpoints")
        if found is None:
            raise InputError(f"{run}: holds no complete checkpoint; expected a folder made by `llara-dist train`")
        checkpoint = found
    config = run_config_from_dict(checkpoint.state["config"])
    contract = checkpoint.state["contract"]
    item_table = load_item_table(config.recommender.path)
    if base_fingerprint(config.model) != contract["base_model"]:
        raise InputError(f"{checkpoint.path}: tuned on another base model than {config.model.path} now holds")
    if sha256_json(item_table.info["files"]) != contract["item_table"]:
        raise InputError(f"{checkpoint.path}: tuned with another item table than {config.recommender.path} now holds")
    model = build_hybrid_llama(config.model, config.lora, config.projector, item_table.weight, device, config.seed)
    load_parameters(model, checkpoint)
    return Trained(model.eval(), config, checkpoint)
