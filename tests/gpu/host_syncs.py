"""What a process of its own runs for test_host_syncs.py: DeepSpeed takes its accelerator once a process."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from llara_dist import distributed
from llara_dist.config import LoraConfig
from llara_dist.supervision.progress import Phase
from llara_dist.training.preflight.examine import open_inputs
from llara_dist.training.run import open_run
from tests.runs import run_config


def main(inputs: Path, out: Path, stage: str) -> None:
    """Train three steps; in the last a micro-batch that synchronises is an error, and the rest is counted."""
    world = distributed.World()
    config = dataclasses.replace(run_config(inputs, out, stage, max_steps=3), lora=LoraConfig(dropout=0.1))
    config = dataclasses.replace(config, device="cuda")
    device = distributed.pick_device(config.device, world)
    distributed.initialise(world, device)
    run = open_run(config, open_inputs(config, world), world, device)
    steps = list(run.loader)
    for step in steps[:-1]:  # what is made once: kernels, moments
        run.engine.train_step(step, 1e-3, 1e-3)
    enters = run.engine.phases.enter

    def enter(phase: Phase, *rest: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if phase in (Phase.FORWARD, Phase.BACKWARD) else "warn")
        enters(phase, *rest)

    run.engine.phases.enter = enter  # pyright: ignore[reportAttributeAccessIssue]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run.engine.train_step(steps[-1], 1e-3, 1e-3)
        torch.cuda.set_sync_debug_mode("default")
    norm = result.grad_norm
    # Not the warning that the mode is a prototype, which the process's first use of it gives as well.
    told = [found for found in caught if "called a synchronizing" in str(found.message)]
    where = [f"{found.filename}:{found.lineno}" for found in told]
    print(json.dumps({"synchronisations": where, "norm": norm}))
    distributed.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
