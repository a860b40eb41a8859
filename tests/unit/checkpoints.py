"""Checkpoints without a language model: a small engine on one rank without ZeRO, and snapshots made by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from llara_dist.distributed import World
from llara_dist.training.checkpoints.snapshot import Snapshot
from llara_dist.training.checkpoints.writer import CheckpointWriter

LORA, PROJECTOR = "llm.base_model.model.q_proj.lora_A.default.weight", "projector.up.weight"


class SmallEngine:
    """What a writer asks of an engine: two parameters under AdamW."""

    def __init__(self, elements: int = 64) -> None:
        self.world = World()
        self.parameters = {name: nn.Parameter(torch.zeros(elements)) for name in (LORA, PROJECTOR)}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.1)
        adapter = SimpleNamespace(to_dict=lambda: {"r": 8, "target_modules": {"q_proj"}})
        self.model: Any = SimpleNamespace(llm=SimpleNamespace(peft_config={"default": adapter}))

    def step(self) -> None:
        """One optimizer step; every parameter and moment changes."""
        for parameter in self.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def copies(self) -> dict[str, torch.Tensor]:
        """What optimizer.safetensors should hold now."""
        found = {f"master/{name}": value.detach().clone() for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
            state = self.optimizer.state[value]
            found |= {f"{key}/{name}": state[key].clone() for key in ("exp_avg", "exp_avg_sq", "step")}
        return found


def snapshot(step: int, elements: int = 1000) -> Snapshot:
    """A snapshot whose every value is its step."""
    masters = {name: torch.full((elements,), float(step)) for name in (LORA, PROJECTOR)}
    moments = {f"{key}/{name}": value.clone() for key in ("exp_avg", "exp_avg_sq") for name, value in masters.items()}
    return Snapshot(step, masters, moments, {"r": 8}, f'{{"format_version": 1, "step": {step}}}')


def write_checkpoint(folder: Path, step: int) -> Path:
    """Write a complete checkpoint, all that are there staying."""
    with CheckpointWriter(folder, keep_last=100) as writer:
        writer.write(snapshot(step))
    return folder / f"step-{step:08d}"
