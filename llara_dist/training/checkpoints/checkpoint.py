"""Checkpoints without rank files: whole tensors by parameter name, so that any world size loads them.

A checkpoint is a folder that appears complete or not at all. It holds `adapter_model.safetensors` and
`adapter_config.json` (plain PEFT loads them), `projector.safetensors`, `optimizer.safetensors` (fp32 masters and
moments by parameter name), `state.json` (what run this is and where it stands: see `provenance`), and last
`complete.json`, which lists the sha256 of every other file. Nothing in it is code or a pickle.

This room reads; `snapshot` and `writer` write.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llara_dist.console import say
from llara_dist.errors import InputError
from llara_dist.integrity import read_json, sha256_file
from llara_dist.model.hybrid import HybridLlama
from llara_dist.training.checkpoints.best import BEST, read_best
from llara_dist.training.checkpoints.folders import MARKER, STATE, checkpoint_folders, checkpoint_path
from llara_dist.training.engine import Engine
from llara_dist.training.optimizer_state import write_moments

FORMAT_VERSION = 1
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PROJECTOR = "projector.safetensors"
OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: its folder.
        state: state.json.
    """

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """How many optimizer steps are done; the next one to run."""
        return int(self.state["step"])

    @property
    def progress(self) -> dict[str, Any]:
        """What the loop counted up to here beside steps; empty where it counted nothing."""
        return self.state.get("progress", {})


def peft_key(name: str) -> str:
    """What PEFT calls an adapter's parameter in its files."""
    return name.removeprefix("llm.").replace(".default.", ".")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open one checkpoint and check every file against the completion marker.

    Raises:
        InputError: incomplete, damaged, or of another format.
    """
    marker = read_json(path / MARKER, "a checkpoint's completion marker")
    hashes = marker.get("sha256")
    if not isinstance(hashes, dict) or STATE not in hashes:
        raise InputError(f"{path / MARKER}: lists no files; the checkpoint is damaged")
    for name, expected in hashes.items():
        if not (path / name).is_file():
            raise InputError(f"{path / name}: missing from the checkpoint")
        if sha256_file(path / name) != expected:
            raise InputError(f"{path / name}: content differs from the completion marker; the checkpoint is damaged")
    state = read_json(path / STATE, "a checkpoint's state")
    if state.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: checkpoint format {state.get('format_version')}, this version reads {FORMAT_VERSION}"
        )
    return Checkpoint(path, state)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None; damaged ones are reported and passed over."""
    for path in reversed(checkpoint_folders(folder)):
        try:
            return open_checkpoint(path)
        except InputError as error:
            say(f"passing over a checkpoint: {error}")
    return None


def best_checkpoint(folder: Path) -> Checkpoint:
    """The best checkpoint by validation.

    Args:
        folder: the run's `checkpoints` folder.

    Raises:
        InputError: the run validated nothing, or its best checkpoint is damaged.
    """
    score = read_best(folder)
    if score is None:
        raise InputError(
            f"{folder / BEST}: not found: this run has no best checkpoint; it did not validate "
            "(validation.every_steps); use --checkpoint last"
        )
    try:
        return open_checkpoint(checkpoint_path(folder, score.step))
    except InputError as error:
        raise InputError(f"{error}; {folder / BEST} names it as the best: use --checkpoint last") from None


def load_parameters(model: HybridLlama, checkpoint: Checkpoint) -> None:
    """Copy adapters and projector into a model that DeepSpeed has not partitioned yet; strict in both directions.

    Raises:
        InputError: a parameter is missing, surplus, or of another shape.
    """
    stored = {f"llm.{key}": value for key, value in _tensors(checkpoint.path / ADAPTER).items()}
    stored |= {f"projector.{key}": value for key, value in _tensors(checkpoint.path / PROJECTOR).items()}
    wanted = {
        (n if n.startswith("projector.") else f"llm.{peft_key(n)}"): p
        for n, p in (model.lora_parameters() | model.projector_parameters()).items()
    }
    if stored.keys() != wanted.keys():
        name = sorted(stored.keys() ^ wanted.keys())[0]
        where = "the checkpoint lacks" if name in wanted else "the model has no"
        raise InputError(
            f"{checkpoint.path}: {where} parameter {name}; lora.targets and projector must be as in the run"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            if stored[name].shape != parameter.shape:
                raise InputError(
                    f"{checkpoint.path}: {name} has shape {tuple(stored[name].shape)}, the model's is "
                    f"{tuple(parameter.shape)}; lora.rank, projector and model.path must be as in the run"
                )
            parameter.copy_(stored[name])


def load_moments(engine: Engine, checkpoint: Checkpoint) -> None:
    """Fill AdamW's moments, on any world size and ZeRO stage.

    Raises:
        InputError: optimizer.safetensors is damaged or lacks a parameter.
    """
    stored = _tensors(checkpoint.path / OPTIMIZER)
    moments = {name: value for name, value in stored.items() if not name.startswith("master/")}
    try:
        write_moments(engine.optimizer, engine.parameters, moments)
    except KeyError as error:
        raise InputError(f"{checkpoint.path / OPTIMIZER}: holds no {error.args[0]}") from None


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: does not load ({error}); remove this checkpoint to fall back to an older one"
        ) from None
