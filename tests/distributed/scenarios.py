"""Steps driven by hand: which are hybrid, what is broken in them; importable by name for the ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from llara_dist import distributed
from llara_dist.config import RunConfig
from llara_dist.model.hybrid import HybridLlama
from llara_dist.training import engine as engine_room
from llara_dist.training.optimizer_state import read_masters, read_moments
from llara_dist.training.preflight.examine import open_inputs
from llara_dist.training.run import open_run
from tests.distributed.training import join


@dataclass(frozen=True)
class Hybrid:
    """A draw that is told which steps are hybrid; the others are text-only throughout."""

    steps: tuple[int, ...]

    def __call__(self, step: int, keys: np.ndarray, passes: np.ndarray | None = None) -> np.ndarray:
        return np.full(len(keys), step in self.steps)


@dataclass(frozen=True)
class Scenario:
    """What a few steps are made of.

    Attributes:
        name: of the file with the tensors before the first and after each step.
        config: the run.
        hybrid: steps whose samples are all hybrid.
        held: steps with a projector rate of zero.
        left_out: steps that are not run at all.
        poison: (step, what): on rank 1, or the only one, "loss" turns NaN or "gradient" infinite.
        uncured: what is taken out: "projector" = it runs only where there are slots; "moments" = they are not
            forgotten while the projector is held.
    """

    name: str
    config: RunConfig
    hybrid: tuple[int, ...] = ()
    held: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()
    poison: tuple[int, str] | None = None
    uncured: str = ""


def run_scenarios(scenarios: list[Scenario], folder: Path) -> None:
    """Run each and let rank 0 write NAME.safetensors: `STEP/PARAMETER` and `STEP/exp_avg/PARAMETER`, …"""
    world, device = join()
    for scenario in scenarios:
        tensors = _run(scenario, world, device)
        if world.is_main:
            save_file(tensors, folder / f"{scenario.name}.safetensors")
    distributed.shut_down()


def _run(scenario: Scenario, world: distributed.World, device: torch.device) -> dict[str, Tensor]:
    config = scenario.config
    run = open_run(config, open_inputs(config, world), world, device)
    maker = dataclasses.replace(run.loader.maker, draw=Hybrid(scenario.hybrid))
    cured = {"projector": HybridLlama.embed, "moments": engine_room.forget_moments}
    if scenario.uncured == "projector":
        HybridLlama.embed = embed_without_cure
    elif scenario.uncured == "moments":
        engine_room.forget_moments = lambda *_: None
    tensors: dict[str, Tensor] = {}
    try:
        for index in range(run.total_steps):
            if index in scenario.left_out:
                continue
            hook = _poison(scenario, index, run, world)
            held = index in scenario.held
            lora_lr, projector_lr = (config.optimizer.lora_lr, 0.0 if held else config.optimizer.projector_lr)
            result = run.engine.train_step(maker.make(index), lora_lr, projector_lr)
            if hook is not None:
                hook.remove()
            assert result.skipped == (scenario.poison is not None and scenario.poison[0] == index), (index, result)
            if result.skipped:
                mine = {int(key) for batch in maker.make(index).microbatches for key in batch.keys}
                found = set(result.suspects)
                assert found, "nobody is suspected"
                assert found <= mine or world.rank != world.size - 1
            state = read_masters(run.engine.parameters) | read_moments(run.engine.optimizer, run.engine.parameters)
            tensors |= {f"{index}/{name}": value for name, value in state.items()}
    finally:
        HybridLlama.embed = cured["projector"]
        engine_room.forget_moments = cured["moments"]
    return tensors


def embed_without_cure(self: HybridLlama, batch: Any) -> Tensor:
    """As HybridLlama.embed, but the projector does not run where the row has no slot."""
    embeddings = self.llm.get_input_embeddings()(batch.tokens[None]).detach()
    if batch.slot_positions.shape[0] > 0:
        behaviour = self.projector(self.item_table[batch.unique_items]).to(embeddings.dtype)
        embeddings[0].index_copy_(0, batch.slot_positions, behaviour[batch.slot_inverse])
    return embeddings


def _poison(scenario: Scenario, index: int, run: Any, world: distributed.World) -> Any:
    if scenario.poison is None or scenario.poison[0] != index or world.rank != world.size - 1:
        return None
    if scenario.poison[1] == "loss":
        return run.engine.model.register_forward_hook(lambda module, given, loss: loss * float("nan"))
    return _infinite_gradient(run.engine.model)


def _infinite_gradient(model: HybridLlama) -> Any:
    """One element of the gradient that flows into the projector's output becomes infinite; the loss stays finite."""

    def spoil(module: Any, given: Any, output: Tensor) -> Tensor:
        def break_it(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient.view(-1)[0] = float("inf")
            return gradient

        output.register_hook(break_it)
        return output

    return model.projector.register_forward_hook(spoil)
