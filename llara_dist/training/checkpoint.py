"""Checkpoints without rank files: whole tensors by parameter name, so that any world size loads them.

A checkpoint is a folder that appears complete or not at all. It holds `adapter_model.safetensors` and
`adapter_config.json` (plain PEFT loads them), `projector.safetensors`, `optimizer.safetensors` (fp32 masters and
moments by parameter name), `state.json`, and last `complete.json`, which lists the sha256 of every other file.
Nothing in it is code or a pickle.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llara_dist import distributed
from llara_dist.console import say
from llara_dist.errors import InputError
from llara_dist.integrity import read_json, sha256_file, staged_folder, write_json
from llara_dist.model.hybrid import HybridLlama
from llara_dist.training.engine import Engine
from llara_dist.training.optimizer_state import read_masters, read_moments, write_moments

FORMAT_VERSION = 1
ADAPTER = "adapter_model.safetensors"
PROJECTOR = "projector.safetensors"
OPTIMIZER = "optimizer.safetensors"
MARKER = "complete.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: its folder.
        state: state.json: step, plan hash, seed, configuration, versions, fingerprints.
    """

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """How many optimizer steps are done; the next one to run."""
        return int(self.state["step"])


def _peft_key(name: str) -> str:
    return name.removeprefix("llm.").replace(".default.", ".")


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: does not load ({error}); remove this checkpoint to fall back to an older one"
        ) from None


def save_checkpoint(folder: Path, engine: Engine, state: dict[str, Any], keep_last: int) -> Path:
    """Write one checkpoint; every rank calls it (gathering is a collective), rank 0 writes.

    Args:
        folder: the run's `checkpoints` folder.
        engine: whose trainable parameters and moments are saved.
        state: what state.json says beside the format version; `step` names the folder.
        keep_last: how many complete checkpoints stay.

    Returns:
        The checkpoint's folder.
    """
    from safetensors.torch import save_file

    masters = read_masters(engine.parameters)
    moments = read_moments(engine.optimizer, engine.parameters)
    path = folder / f"step-{state['step']:08d}"
    if engine.world.is_main:
        with staged_folder(path, replace=True) as staging:
            lora = {_peft_key(n): t for n, t in masters.items() if not n.startswith("projector.")}
            projector = {n.removeprefix("projector."): t for n, t in masters.items() if n.startswith("projector.")}
            save_file(lora, staging / ADAPTER, metadata={"format": "pt"})
            save_file(projector, staging / PROJECTOR, metadata={"format": "pt"})
            save_file({f"master/{n}": t for n, t in masters.items()} | moments, staging / OPTIMIZER)
            write_json(staging / "adapter_config.json", _adapter_config(engine.model))
            write_json(staging / "state.json", {"format_version": FORMAT_VERSION, **state})
            hashes = {file.name: sha256_file(file) for file in sorted(staging.iterdir())}
            write_json(staging / MARKER, {"format_version": FORMAT_VERSION, "sha256": hashes})
        rotate(folder, path, keep_last)
    distributed.barrier()
    return path


def rotate(folder: Path, newest: Path, keep_last: int) -> None:
    """Keep the checkpoint just written and the newest complete ones before it; remove all else.

    What lies after it was passed over as damaged when this run resumed; hidden folders are left from killed writers.

    Args:
        folder: the run's `checkpoints` folder.
        newest: the checkpoint just written; it always stays.
        keep_last: how many complete checkpoints stay, `newest` included.
    """
    older = [path for path in sorted(folder.glob("step-*")) if path < newest and (path / MARKER).is_file()]
    kept = {newest, *older[::-1][: keep_last - 1]}
    for path in [*folder.glob("step-*"), *folder.glob(".step-*")]:
        if path not in kept:
            shutil.rmtree(path)


def _adapter_config(model: HybridLlama) -> dict[str, Any]:
    settings = model.llm.peft_config["default"].to_dict()
    settings["inference_mode"] = True
    return json.loads(
        json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )


def open_checkpoint(path: Path) -> Checkpoint:
    """Open one checkpoint and check every file against the completion marker.

    Raises:
        InputError: incomplete, damaged, or of another format.
    """
    marker = read_json(path / MARKER, "a checkpoint's completion marker")
    hashes = marker.get("sha256")
    if not isinstance(hashes, dict) or "state.json" not in hashes:
        raise InputError(f"{path / MARKER}: lists no files; the checkpoint is damaged")
    for name, expected in hashes.items():
        if not (path / name).is_file():
            raise InputError(f"{path / name}: missing from the checkpoint")
        if sha256_file(path / name) != expected:
            raise InputError(f"{path / name}: content differs from the completion marker; the checkpoint is damaged")
    state = read_json(path / "state.json", "a checkpoint's state")
    if state.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: checkpoint format {state.get('format_version')}, this version reads {FORMAT_VERSION}"
        )
    return Checkpoint(path, state)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None; damaged ones are reported and passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return open_checkpoint(path)
        except InputError as error:
            say(f"passing over a checkpoint: {error}")
    return None


def load_parameters(model: HybridLlama, checkpoint: Checkpoint) -> None:
    """Copy adapters and projector into a model that DeepSpeed has not partitioned yet; strict in both directions.

    Raises:
        InputError: a parameter is missing, surplus, or of another shape.
    """
    stored = {f"llm.{key}": value for key, value in _tensors(checkpoint.path / ADAPTER).items()}
    stored |= {f"projector.{key}": value for key, value in _tensors(checkpoint.path / PROJECTOR).items()}
    wanted = {
        (n if n.startswith("projector.") else f"llm.{_peft_key(n)}"): p
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
