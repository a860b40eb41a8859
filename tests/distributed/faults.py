"""Ranks that meet a fault: one dies, stops, hangs or fails in the middle of a loop of all-reduces.

Started as `python -m tests.distributed.faults RANK SIZE FOLDER FAULT`; the fault happens on the last rank at step 5.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from llara_dist.distributed import World, end_process
from llara_dist.errors import EXIT_RANK_LOST, RankLostError
from llara_dist.supervision import process_identity
from llara_dist.supervision.progress import Phase
from llara_dist.supervision.rank_status import RankStatus, parse_status, status_path
from llara_dist.supervision.watchdog import RankMonitor
from tests.runs import ROOT

STEP = 5
KEYS = tuple(range(100, 112))
HANG_TIMEOUT_S = 3.0

ALONE_ON_A_HOST = {"kill, with rank 0 elsewhere": 0, "kill, alone on a host": 2}
"""Ranks that pretend to run on another host than the rest: neither side can look at the other's processes."""


def fault_at(phase: Phase, step: int, fault: str, file: Path) -> None:
    """What the last rank does; `file` is its status file."""
    if step != STEP:
        return
    if phase is Phase.DATA and fault == "spin":
        while True:
            pass
    if phase is Phase.FORWARD and fault.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if phase is Phase.REDUCE and fault == "spin beside a collective":
        while True:
            pass
    if phase is Phase.FORWARD and fault == "suspend":
        wait_until_told(file, phase)
        os.kill(os.getpid(), signal.SIGSTOP)
    if phase is Phase.FORWARD and fault == "fail":
        raise ValueError("shard 7 is damaged")
    if phase is Phase.BACKWARD and fault == "hold the interpreter":
        wait_until_told(file, phase)
        ctypes.PyDLL(None).sleep(1000)  # PyDLL: without letting other threads run
    if phase is Phase.VALIDATION and fault == "validate for ever":
        time.sleep(1000)


def wait_until_told(file: Path, phase: Phase) -> None:
    """Wait until the rank's status file tells where it stands: of a silent one the others know nothing else."""
    told = None
    while told != (STEP, phase):
        time.sleep(0.01)
        record = parse_status(file.read_text())
        told = None if record is None else (record.progress.step, record.progress.phase)


def run(rank: int, size: int, folder: Path, fault: str, token: str) -> None:
    """One rank's life."""
    import torch.distributed

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.distributed.barrier()
    try:
        run_steps(rank, size, folder, fault, token)
    finally:
        torch.distributed.destroy_process_group()


def run_steps(rank: int, size: int, folder: Path, fault: str, token: str) -> None:
    """The loop, as the engine's would be."""
    import torch
    import torch.distributed

    if ALONE_ON_A_HOST.get(fault) == rank:
        process_identity._machine = lambda: "another machine"
    status = RankStatus()
    tensor = torch.ones(4)
    with RankMonitor(folder / "run", status, World(rank, rank, size), token, 0.2, HANG_TIMEOUT_S):
        torch.distributed.barrier()
        for step in range(1000):
            for phase in (Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.REDUCE, Phase.STEP, Phase.VALIDATION):
                status.enter(phase, step, keys=KEYS)
                if rank == size - 1:
                    fault_at(phase, step, fault, status_path(folder / "run", rank))
                if fault == "fail everywhere" and step == STEP and phase is Phase.FORWARD:
                    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
                if fault == "die while all validate" and step == STEP and phase is Phase.VALIDATION:
                    if rank == size - 1:
                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(1000)  # no collective that could notice, and no limit of its own
                if phase is Phase.REDUCE:
                    torch.distributed.all_reduce(tensor)


@dataclass(frozen=True)
class Ended:
    """How a rank ended: exit code (negative: the signal that killed it) and what it said on stderr."""

    code: int
    said: str


def run_with_fault(fault: str, folder: Path, size: int = 3, timeout_s: float = 90.0) -> list[Ended]:
    """Run all ranks until each has ended; one that is suspended is killed once the others have."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.distributed.faults"]
    processes, token = [], secrets.token_hex(8)
    for rank in range(size):
        with open(folder / f"stderr-{rank}.txt", "w") as stderr:
            arguments = [str(rank), str(size), str(folder), fault, token]
            processes.append(subprocess.Popen([*command, *arguments], env=environment, cwd=ROOT, stderr=stderr))
    deadline = time.monotonic() + timeout_s
    try:
        for process in processes[:-1] if fault == "suspend" else processes:
            process.wait(timeout=deadline - time.monotonic())
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [Ended(p.returncode, (folder / f"stderr-{rank}.txt").read_text()) for rank, p in enumerate(processes)]


if __name__ == "__main__":
    code = 0
    try:
        run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5])
    except RankLostError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_RANK_LOST
    except Exception:
        traceback.print_exc()
        code = 1
    end_process(code)  # as a rank of a run ends
