"""This package's arm: the run that `llara-dist train` puts together, step by step."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from benchmarks.arms.setup import Setup, set_trained
from benchmarks.arms.turns import Turns
from llara_dist import distributed
from llara_dist.autotune.agreement import without_dropout
from llara_dist.config import KernelsConfig
from llara_dist.model.hybrid import HybridLlama
from llara_dist.stream.batch import collate
from llara_dist.training.preflight.examine import open_inputs
from llara_dist.training.run import open_run


def run(setup: Setup, turns: Turns, name: str, kernels: KernelsConfig, recompute: bool) -> None:
    """Shards, plan, loader, HybridLlama, DeepSpeed stage 0; reading a step's samples is part of its time.

    Args:
        setup: the benchmark's.
        turns: when to compute.
        name: of this arm.
        kernels: which implementation computes.
        recompute: whether activations are recomputed in the backward pass.
    """
    world = distributed.read_world()
    device = distributed.pick_device(setup.device, world)
    distributed.initialise(world, device)
    config = setup.run_config(name, kernels, recompute)
    opened = open_run(config, open_inputs(config, world), world, device)
    model = opened.engine.model
    set_trained([*model.lora_parameters().items(), *model.projector_parameters().items()])
    samples = setup.checked()
    facts = {f"{form}_loss": answer_loss(model, samples, form == "hybrid") for form in ("hybrid", "text")}
    chosen = {k: v for k, v in dataclasses.asdict(model.kernels).items() if k != "reasons"}
    turns.ready(**facts, kernels=chosen, kernels_shown=str(model.kernels))
    steps = iter(opened.loader)
    for _ in range(setup.steps):
        turns.begin()
        step = next(steps)
        result = opened.engine.train_step(step, *opened.rates(step.index))
        turns.end(loss=result.loss, positions=step.tokens, tokens=step.tokens, microbatches=len(step.microbatches))


@torch.no_grad()
def answer_loss(model: HybridLlama, samples: list, hybrid: bool) -> float:
    """Mean cross-entropy of the answers, without dropout."""
    batch = collate(samples, np.full(len(samples), hybrid))
    was = model.training
    model.eval()
    with without_dropout(model):
        loss = float(model(batch.to(model.item_table.device))) / batch.answer_tokens
    model.train(was)
    return loss
