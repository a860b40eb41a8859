"""What a checkpoint holds, copied to the main rank's memory: the steps that follow cannot change it any more."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llara_dist.integrity import json_text, sha256_file, write_file, write_json
from llara_dist.training.checkpoints.checkpoint import (
    ADAPTER,
    ADAPTER_CONFIG,
    FORMAT_VERSION,
    MARKER,
    OPTIMIZER,
    PROJECTOR,
    STATE,
    peft_key,
)
from llara_dist.training.engine import Engine
from llara_dist.training.optimizer_state import read_masters, read_moments

_JSON_BYTES = 1 << 20
"""more than a checkpoint's JSON files and safetensors headers come to"""


@dataclass(frozen=True)
class Snapshot:
    """A run at one step.

    Attributes:
        step: optimizer steps done.
        masters: float32 parameters by name, whole, on the CPU.
        moments: AdamW's, as `read_moments` names them, whole, on the CPU.
        adapter_config: adapter_config.json.
        state: the text of state.json.
    """

    step: int
    masters: dict[str, Tensor]
    moments: dict[str, Tensor]
    adapter_config: dict[str, Any]
    state: str

    @property
    def bytes(self) -> int:
        """What the checkpoint takes on disk, a little more than less: masters are in two files."""
        tensors = [*self.masters.values(), *self.masters.values(), *self.moments.values()]
        return sum(tensor.nbytes for tensor in tensors) + _JSON_BYTES


def take_snapshot(engine: Engine, state: dict[str, Any]) -> Snapshot | None:
    """Copy parameters and moments to the main rank's memory; every rank calls it (gathering is a collective).

    One parameter after the other is made whole, so that no device ever holds more than one of them beside its share.

    Args:
        engine: whose trainable parameters and moments are saved.
        state: what state.json says beside the format version; `step` must be in it.

    Returns:
        The snapshot on the main rank, None on the others, which keep nothing.
    """
    masters: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in engine.parameters.items():
        one = {name: parameter}
        master, moment = read_masters(one), read_moments(engine.optimizer, one)
        if engine.world.is_main:
            masters |= master
            moments |= moment
    if not engine.world.is_main:
        return None
    text = json_text({"format_version": FORMAT_VERSION, **state})
    return Snapshot(state["step"], masters, moments, _adapter_config(engine), text)


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Fill an empty (staging) folder with a checkpoint's files, the completion marker last."""
    from safetensors.torch import save_file

    lora = {peft_key(n): t for n, t in snapshot.masters.items() if not n.startswith("projector.")}
    projector = {n.removeprefix("projector."): t for n, t in snapshot.masters.items() if n.startswith("projector.")}
    save_file(lora, folder / ADAPTER, metadata={"format": "pt"})
    save_file(projector, folder / PROJECTOR, metadata={"format": "pt"})
    save_file({f"master/{n}": t for n, t in snapshot.masters.items()} | snapshot.moments, folder / OPTIMIZER)
    write_json(folder / ADAPTER_CONFIG, snapshot.adapter_config)
    write_file(folder / STATE, snapshot.state)
    hashes = {file.name: sha256_file(file) for file in sorted(folder.iterdir())}
    write_json(folder / MARKER, {"format_version": FORMAT_VERSION, "sha256": hashes})


def _adapter_config(engine: Engine) -> dict[str, Any]:
    settings = engine.model.llm.peft_config["default"].to_dict()
    settings["inference_mode"] = True
    return json.loads(
        json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )
