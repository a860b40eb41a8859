"""Where a process stands, as each launcher says it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llara_dist.distributed import World, local_size, read_world
from llara_dist.errors import InputError
from tests.distributed.ranks import run_ranks

STEP = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, World()),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, World(3, 1, 4)),
        (STEP, World(5, 1, 8)),
        (STEP | {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, World(2, 0, 4)),
        ({name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"}, World()),
    ],
    ids=["none", "torchrun and deepspeed", "srun", "deepspeed under srun", "a shell inside sbatch"],
)
def test_world_by_launcher(environment: dict[str, str], expected: World) -> None:
    assert read_world(environment) == expected


def test_a_launcher_that_says_only_half() -> None:
    with pytest.raises(InputError, match="RANK is not set but WORLD_SIZE is"):
        read_world({"WORLD_SIZE": "4"})
    with pytest.raises(InputError, match="SLURM_LOCALID is not set"):
        read_world({name: value for name, value in STEP.items() if name != "SLURM_LOCALID"})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 8),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"LOCAL_SIZE": "2"}, 2),
        ({"SLURM_NTASKS_PER_NODE": "4"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2),4", "SLURM_NODEID": "1"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2),4", "SLURM_NODEID": "2"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2),4", "SLURM_NODEID": "3"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(?)", "SLURM_NODEID": "0"}, 8),
        ({"LOCAL_WORLD_SIZE": "16"}, 8),
    ],
    ids=[
        "none",
        "torchrun",
        "deepspeed",
        "srun",
        "srun -n",
        "uneven",
        "no such node",
        "unknown",
        "more than there are",
    ],
)
def test_ranks_of_a_node(environment: dict[str, str], expected: int) -> None:
    assert local_size(World(size=8), environment) == expected


def look_at_deepspeed() -> None:
    import torch

    from llara_dist import distributed

    world = read_world()
    distributed.initialise(world, torch.device("cpu"), timeout_s=60.0)
    import deepspeed.ops

    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    distributed.shut_down()


def test_deepspeed_compiles_nothing_on_the_cpu(tmp_path: Path) -> None:
    """Else the first run takes two minutes of CPU, and a killed one leaves a lock that blocks all later ones."""
    run_ranks(look_at_deepspeed, 1, tmp_path / "ranks")


BUSY_WORKER = """
import atexit, sys, time
import torch, torch.distributed
from llara_dist import cli, distributed

atexit.register(print, "exit callbacks ran")
distributed.initialise(distributed.World(), torch.device("cpu"))
held = torch.distributed.group.WORLD  # as DeepSpeed holds it
work = torch.distributed.all_reduce(torch.ones(3), async_op=True)
# The group's worker comes back to the interpreter again and again, in the midst of the process's end.
work.get_future().then(lambda future: [time.sleep(0.0005) for _ in range(6000)])
distributed.shut_down()
cli.run_process(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [(["--version"], 0, ""), (["train", "--config", "missing.yaml"], 2, "missing.yaml")],
    ids=["well", "bad input"],
)
def test_a_worker_thread_of_the_group_does_not_abort_the_end(words: list[str], code: int, said: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", BUSY_WORKER, *words], capture_output=True, text=True, check=False, timeout=120
    )
    assert (ended.returncode, "terminate called" in ended.stderr) == (code, False), ended.stderr
    assert "exit callbacks ran" in ended.stdout
    assert said in ended.stderr
