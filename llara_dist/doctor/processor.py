"""Processor and memory: what this node's ranks and their data workers share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llara_dist.config import DataConfig
from llara_dist.console import GIB
from llara_dist.doctor.verdicts import error, passed, warning
from llara_dist.errors import Finding
from llara_dist.training.preflight.resources import cpu_has_bf16, free_host_bytes

RANK_BYTES = 4 * GIB
"""host memory of a rank beside its GPU: Python, torch with CUDA, data workers, a checkpoint being written"""


@dataclass(frozen=True)
class ProcessorFacts:
    """What was found out about this node.

    Attributes:
        cores: that this process may run on.
        quota: cores' worth of time that its control group allows, None = no limit.
        threads: OMP_NUM_THREADS, "" where it is not set.
        bf16: whether the processor multiplies bfloat16 in hardware.
        free: bytes of memory that this node's processes can still take.
        own: whether the cores are this rank's alone: srun binds each of its tasks to its share.
    """

    cores: int
    quota: float | None
    threads: str
    bf16: bool
    free: int
    own: bool = False


def probe(environment: Mapping[str, str] | None = None) -> ProcessorFacts:
    """Look at this node."""
    env = os.environ if environment is None else environment
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = env.get("SLURM_CPUS_PER_TASK", "1")
    own = "SLURM_STEP_ID" in env and share.isdecimal() and cores <= int(share)
    return ProcessorFacts(cores, read_quota(), env.get("OMP_NUM_THREADS", ""), cpu_has_bf16(), free_host_bytes(), own)


def read_quota(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that the control groups (v2, v1) of this process allow; None without limit."""
    limits = []
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    for _, controllers, path in groups:
        places = [cgroups] if controllers == "" else [cgroups / "cpu", cgroups / "cpu,cpuacct"]
        for top in places if controllers == "" or "cpu" in controllers.split(",") else []:
            folder = top / path.lstrip("/")
            for above in (folder, *folder.parents):
                if above == cgroups.parent:
                    break
                limits.append(_limit(above))
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text()
    except (OSError, ValueError):
        return None
    return int(quota) / int(period) if quota.isdecimal() else None


def check_cores(facts: ProcessorFacts, ranks: int, workers: int = DataConfig().workers) -> list[Finding]:
    """Cores for ranks, their data workers and their threads.

    Args:
        facts: of this node.
        ranks: that this node would run.
        workers: data workers a rank.
    """
    ranks = 1 if facts.own else ranks
    usable = facts.cores if facts.quota is None else min(facts.cores, facts.quota)
    shown = f"{facts.cores} cores" + (f", time for {facts.quota:g} of them" if facts.quota is not None else "")
    each = "1 rank" if ranks == 1 else f"{ranks} ranks"
    findings = []
    if usable < ranks * (1 + workers):
        found = f"{shown} for {each} with {workers} data workers each"
        remedy = "ask for more (Slurm: --cpus-per-task), or lower data.workers"
        findings.append(warning("cores", found, remedy))
    else:
        findings.append(passed("cores", f"{shown}, {each} with {workers} data workers each"))
    threads = int(facts.threads) if facts.threads.isdecimal() else 0
    if not threads and ranks > 1:
        found = f"OMP_NUM_THREADS is not set: each of {ranks} ranks starts {facts.cores} threads"
        findings.append(warning("threads", found, f"export OMP_NUM_THREADS={max(1, int(usable) // ranks)}"))
    elif threads * ranks > facts.cores:
        found = f"OMP_NUM_THREADS={threads} for {each} on {facts.cores} cores"
        findings.append(warning("threads", found, f"export OMP_NUM_THREADS={max(1, int(usable) // ranks)}"))
    return findings


def check_memory(facts: ProcessorFacts, ranks: int) -> list[Finding]:
    """Host memory for the ranks beside their GPUs; what the model takes, `llara-dist preflight` knows."""
    found = f"{facts.free / GIB:.1f} GiB free"
    need = ranks * RANK_BYTES
    remedy = "ask for more (Slurm: --mem), or end what takes it"
    if facts.free < GIB:
        return [error("memory", f"{found}: too little to start", remedy)]
    if facts.free < need:
        return [warning("memory", f"{found}; a rank takes about {RANK_BYTES // GIB} GiB beside its GPU", remedy)]
    return [passed("memory", found)]


def check_arithmetic(facts: ProcessorFacts, gpus: int) -> list[Finding]:
    """What a CPU computes in where there is no GPU."""
    if gpus:
        return []
    how = "in hardware" if facts.bf16 else "not in hardware (6 to 20 times slower)"
    return [passed("bfloat16", f"{how}; a run on the CPU computes in float32 unless told otherwise")]


def examine(facts: ProcessorFacts, ranks: int, gpus: int) -> list[Finding]:
    """The topic's findings."""
    return [*check_cores(facts, ranks), *check_memory(facts, ranks), *check_arithmetic(facts, gpus)]
