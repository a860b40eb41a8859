"""`llara-dist train`: training put together with what it is given from other rooms."""

from __future__ import annotations

from typing import Any

from llara_dist import distributed
from llara_dist.config import RunConfig
from llara_dist.console import say
from llara_dist.training.debug import Debugger, clear, shrink
from llara_dist.training.loop import train_loop
from llara_dist.training.preflight import open_inputs
from llara_dist.training.run import open_run


def train(config: RunConfig, debug: bool = False) -> dict[str, Any]:
    """Tune LoRA and projector; the same code on one process, under `deepspeed`, `torchrun` and `srun`.

    Args:
        config: the run.
        debug: make it small and loud, on one process (see `training/debug.py`).

    Returns:
        What the run did: steps, last loss, checkpoint folder.

    Raises:
        InputError: bad input, found before any weight is read wherever that is possible.
    """
    world = distributed.read_world()
    if debug:
        config = shrink(config, world)
    inputs = open_inputs(config, world)
    if debug:
        clear(config.out)
    device = distributed.pick_device(config.device, world)
    distributed.initialise(world, device)
    try:
        debugger = Debugger(config, device) if debug else None
        run = open_run(config, inputs, world, device)
        if world.is_main and inputs.plan.epoch(run.total_steps - 1) > 0 and inputs.plan.repeats_passes:
            say(
                f"{config.data.shards} holds fewer passes than the run reads: later epochs show the same prompts and "
                "candidates again; build with more --passes to draw them anew"
            )
        if world.is_main and run.first_step > 0:
            say(f"going on from step {run.first_step} of {run.total_steps}")
        return train_loop(run, debugger)
    finally:
        distributed.shut_down()
