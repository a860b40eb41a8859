"""Rank, world and process group: the only reader of RANK, WORLD_SIZE, LOCAL_RANK and SLURM_*."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from llara_dist.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class World:
    """Where this process stands.

    Attributes:
        rank: of all processes, 0-based.
        local_rank: on this node, 0-based; also the index of the device.
        size: number of processes.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and artifacts."""
        return self.rank == 0


def read_world(environment: Mapping[str, str] | None = None) -> World:
    """Read the launcher's variables: RANK/WORLD_SIZE/LOCAL_RANK first, then SLURM's, else a world of one.

    `deepspeed --launcher SLURM` and plain `srun` set no RANK, only SLURM_PROCID, SLURM_LOCALID and SLURM_NTASKS.
    A shell inside `salloc` or `sbatch` without `srun` has SLURM_NTASKS but no SLURM_STEP_ID: a world of one.

    Raises:
        InputError: the variables are incomplete or contradict each other.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env or "WORLD_SIZE" in env:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    else:
        return World()
    missing = [name for name in names if name not in env]
    if missing:
        present = next(name for name in names if name in env)
        raise InputError(f"environment: {missing[0]} is not set but {present} is; start through deepspeed or torchrun")
    try:
        rank, local_rank, size = (int(env[name]) for name in names)
    except ValueError:
        raise InputError(f"environment: {', '.join(f'{n}={env[n]}' for n in names)}: not all integers") from None
    if not 0 <= rank < size:
        raise InputError(f"environment: {names[0]}={rank} is outside the world of {names[2]}={size}")
    return World(rank=rank, local_rank=local_rank, size=size)


def local_size(world: World, environment: Mapping[str, str] | None = None) -> int:
    """How many ranks run on this node, as the launcher says (torchrun, deepspeed, srun); all, where it does not."""
    env = os.environ if environment is None else environment
    said = [env.get(name, "") for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")]
    if env.get("SLURM_NODEID", "").isdecimal():
        tasks = tasks_of_nodes(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
        said += map(str, tasks[int(env["SLURM_NODEID"]) :][:1])
    said.append(env.get("SLURM_NTASKS_PER_NODE", ""))
    return next((int(text) for text in said if text.isdecimal() and 1 <= int(text) <= world.size), world.size)


def tasks_of_nodes(text: str) -> list[int]:
    """The tasks of each node, from how Slurm writes them: "8(x2),4" → 8, 8, 4; none where it is written otherwise."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))] if all(parts) else []


@dataclass(frozen=True)
class Job:
    """Which start of which scheduled job this process belongs to.

    Attributes:
        name: "1234@cluster" under Slurm (an array's tasks have an id each); "" where no scheduler gave one.
        restart: how often the scheduler has requeued it; 0 = its first start.
        step: Slurm's job step, one `srun`; "" outside of one.
    """

    name: str = ""
    restart: int = 0
    step: str = ""


def read_job(environment: Mapping[str, str] | None = None) -> Job:
    """Read SLURM_JOB_ID, SLURM_CLUSTER_NAME, SLURM_RESTART_COUNT and SLURM_STEP_ID; without Slurm a job without name.

    Raises:
        InputError: SLURM_RESTART_COUNT is no number.
    """
    env = os.environ if environment is None else environment
    if "SLURM_JOB_ID" not in env:
        return Job()
    cluster = env.get("SLURM_CLUSTER_NAME", "")
    restart = env.get("SLURM_RESTART_COUNT", "0")
    if not restart.isdecimal():
        raise InputError(f"environment: SLURM_RESTART_COUNT={restart}: not a number; unset it or start through sbatch")
    name = f"{env['SLURM_JOB_ID']}@{cluster}" if cluster else env["SLURM_JOB_ID"]
    return Job(name=name, restart=int(restart), step=env.get("SLURM_STEP_ID", ""))


PORTS_BEGIN, _JOBS, _RESTARTS, _STEPS = 12288, 1024, 8, 2
"""Ports of Slurm jobs: above the system's services, below the ports that Linux hands out itself (from 32768)."""


def slurm_master(environment: Mapping[str, str] | None = None) -> tuple[str, int] | None:
    """Where rank 0 of this job step listens: host and TCP port, the same for all its tasks; None outside of `srun`.

    The port follows from the ids of job and step and the number of restarts: two jobs of which both run on a node
    share none unless their ids are 1024 apart, nor do two steps that follow each other in one job, nor a job and what
    may be left of its last seven starts.

    Raises:
        InputError: SLURM_JOB_ID or SLURM_RESTART_COUNT is no number.
    """
    env = os.environ if environment is None else environment
    nodes, job = env.get("SLURM_STEP_NODELIST", ""), env.get("SLURM_JOB_ID", "")
    step = env.get("SLURM_STEP_ID", "")
    if not nodes or not step.isdecimal():
        return None
    if not job.isdecimal():
        raise InputError(f"environment: SLURM_JOB_ID={job}: not a number; set MASTER_ADDR and MASTER_PORT yourself")
    slot = read_job(env).restart % _RESTARTS + _RESTARTS * (int(step) % _STEPS)
    return first_host(nodes), PORTS_BEGIN + int(job) % _JOBS * _RESTARTS * _STEPS + slot


def first_host(nodelist: str) -> str:
    """The first host of a list as Slurm writes it: gpu[003-007,9],x1 → gpu003."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


def pick_device(wanted: str, world: World) -> torch.device:
    """The device of this rank: CUDA device `local_rank` where there is one (or asked for), else the CPU.

    Raises:
        InputError: CUDA is asked for and there is none, or fewer devices than local ranks.
    """
    import torch

    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        # Of several ranks, those of another node may well see theirs.
        raise InputError("device=cuda: torch sees no CUDA device; use --device auto or cpu", everywhere=world.size == 1)
    visible = torch.cuda.device_count()
    if visible == 1 and "SLURM_PROCID" in os.environ:
        return torch.device("cuda", 0)  # each task was bound to a GPU of its own and sees no other
    if world.local_rank >= visible:
        raise InputError(
            f"local rank {world.local_rank} has no GPU of its own: this node shows {visible}; start fewer ranks",
            everywhere=False,
        )
    return torch.device("cuda", world.local_rank)


def initialise(world: World, device: torch.device, timeout_s: float = 1800.0, init_method: str | None = None) -> None:
    """Join the process group: NCCL on CUDA, gloo on the CPU; DeepSpeed's communication layer sits on the same group.

    A world of one needs no rendezvous. `LLARA_DIST_INIT_METHOD` (e.g. file:///shared/rendezvous) replaces
    MASTER_ADDR/MASTER_PORT; a file needs no free port. Under `srun` that set neither, they follow from the job.
    """
    import torch
    import torch.distributed

    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed asks for it even where it is alone
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        arguments: dict[str, Any] = {"rank": world.rank, "world_size": world.size}
        method = init_method or os.environ.get("LLARA_DIST_INIT_METHOD")
        if world.size == 1:
            arguments["store"] = torch.distributed.HashStore()
        elif method:
            arguments["init_method"] = method
        elif "MASTER_ADDR" not in os.environ:
            master = slurm_master()
            if master is None:
                raise InputError(
                    f"world of {world.size} ranks but MASTER_ADDR is not set: start through deepspeed, torchrun or srun"
                )
            arguments["init_method"] = f"tcp://{master[0]}:{master[1]}"
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **arguments)
    _join_deepspeed(device, timeout_s)


def _join_deepspeed(device: torch.device, timeout_s: float) -> None:
    import logging

    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # Else the first run compiles a shared-memory all-reduce for about 100 s of CPU, and a killed compile
        # leaves a lock behind on which every later run waits.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore[reportAttributeAccessIssue]
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        timeout=timedelta(seconds=timeout_s),
    )


def shut_down() -> None:
    """Leave the process group, if one was joined.

    Through DeepSpeed, which keeps a handle on the group: left in place, it would hand out the dead group to the next
    run of the same process.
    """
    import torch.distributed

    if torch.distributed.is_initialized():
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End this process in order, but for the interpreter's finalisation where torch has been loaded.

    A worker thread of a process group may still be letting go of a collective's tensors, for which it needs the
    interpreter. One that is being finalised aborts the process instead, after all its work is done: "terminate called
    without an active exception", SIGABRT (pytorch/pytorch issues 38228 and 190489). To leave the group does not end
    the thread while anything refers to the group, as DeepSpeed's engines do.

    Args:
        code: exit code.
    """
    if "torch" not in sys.modules:
        sys.exit(code)
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it has gone, or it is closed
            stream.flush()
    os._exit(code)


def sum_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place; one collective, the same result on each."""
    import torch.distributed

    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    import torch.distributed

    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def of_main(value: Any) -> Any:
    """The main rank's value, on every rank; what the others give is not looked at."""
    return gather_objects(value)[0]


def node_ranks(world: World) -> list[range]:
    """The ranks of each node, in order; a collective. Ranks of a node follow each other in every launcher's order."""
    starts = [rank for rank, local in enumerate(gather_objects(world.local_rank)) if local == 0 or rank == 0]
    return [range(*pair) for pair in zip(starts, [*starts[1:], world.size], strict=True)]


def barrier() -> None:
    """Wait until every rank is here."""
    import torch.distributed

    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
