"""What ranks run in the tests of checkpoints; importable by name."""

from __future__ import annotations

import errno
from pathlib import Path

import torch

from llara_dist import distributed
from llara_dist.config import RunConfig
from llara_dist.errors import InputError
from llara_dist.training.checkpoints.snapshot import Snapshot, write_snapshot
from llara_dist.training.checkpoints.writer import CheckpointWriter
from llara_dist.training.optimizer_state import read_moments, write_moments
from llara_dist.training.preflight.examine import open_inputs
from llara_dist.training.run import open_run
from tests.distributed.training import join


def save_where_the_projector_began_late(config: RunConfig) -> None:
    """Train three steps and save as if the projector had its first update in the third."""
    world, device = join()
    run = open_run(config, open_inputs(config, world), world, device)
    for step in run.loader:
        if step.index == 3:
            break
        run.engine.train_step(step, *run.rates(step.index))
    moments = read_moments(run.engine.optimizer, run.engine.parameters)
    late = {name: torch.tensor(1.0) for name in moments if name.startswith("step/projector.")}
    write_moments(run.engine.optimizer, run.engine.parameters, moments | late)
    run.save(3)
    run.writer.wait()
    distributed.shut_down()


def load_and_save(configs: list[RunConfig]) -> None:
    """Open each run where its checkpoint left off, and save it at once, unchanged, in `again` beside it."""
    world, device = join()
    for config in configs:
        inputs = open_inputs(config, world)
        assert inputs.checkpoint is not None
        run = open_run(config, inputs, world, device)
        with CheckpointWriter(config.out / "again", keep_last=1) as writer:
            writer.save(run.engine, {"step": inputs.checkpoint.step}, required=True)
    distributed.shut_down()


def train_on_a_disk_that_fills(config: RunConfig, fails: set[int], must_fail: bool) -> None:
    """Train every step; the main rank's disk refuses the checkpoints of some; every rank ends alike."""

    def write(folder: Path, snapshot: Snapshot) -> None:
        write_snapshot(folder, snapshot)
        if snapshot.step in fails:
            raise OSError(errno.ENOSPC, "injected")

    world, device = join()
    run = open_run(config, open_inputs(config, world), world, device)
    run.writer._write_folder = write
    message = ""
    try:
        for step in run.loader:
            run.engine.train_step(step, *run.rates(step.index))
            if run.checkpoint_due(step.index + 1):
                run.save(step.index + 1)
    except InputError as error:
        message = str(error)
    assert bool(message) == must_fail
    (config.out / f"rank-{world.rank}.txt").write_text(message)
    distributed.shut_down()
