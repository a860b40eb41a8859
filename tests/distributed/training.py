"""What ranks run in the distributed tests; importable by name."""

from __future__ import annotations

import torch

from llara_dist import distributed
from llara_dist.config import RunConfig
from llara_dist.training.loop import train_loop
from llara_dist.training.preflight.examine import open_inputs
from llara_dist.training.run import open_run


def join() -> tuple[distributed.World, torch.device]:
    """Join the ranks' process group; a rank that hangs fails within minutes."""
    world = distributed.read_world()
    device = distributed.pick_device("cpu", world)
    distributed.initialise(world, device, timeout_s=240.0)
    return world, device


def train_all(configs: list[RunConfig]) -> None:
    """Train several runs one after the other in one process group."""
    world, device = join()
    for config in configs:
        train_loop(open_run(config, open_inputs(config, world), world, device))
    distributed.shut_down()


def train_until(config: RunConfig, stop: int) -> None:
    """Train the steps before `stop` of a run whose schedules and plan are those of the whole, and save."""
    world, device = join()
    run = open_run(config, open_inputs(config, world), world, device)
    for step in run.loader:
        if step.index == stop:
            break
        run.engine.train_step(step, *run.rates(step.index))
    run.save(stop)
    distributed.shut_down()
