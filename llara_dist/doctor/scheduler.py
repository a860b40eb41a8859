"""What starts a run on several nodes: Slurm and its settings, the site file, ssh and pdsh."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llara_dist.cluster.site import read_site
from llara_dist.distributed import read_job
from llara_dist.doctor.bounded import ProbeError, ask
from llara_dist.doctor.verdicts import error, passed, skipped, warning
from llara_dist.errors import Finding, InputError, findings_of

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
OLDEST = (22, 5)
"""the oldest Slurm that `llara-dist submit` is made for"""
ANSWERS_S = 10.0
SAVING_S = 30
"""seconds between SIGTERM and SIGKILL in which a step and a checkpoint of an ordinary run are done"""


@dataclass(frozen=True)
class SlurmFacts:
    """What was found out about Slurm.

    Attributes:
        missing: of `COMMANDS`, those that are not here.
        version: (year, month); None = it does not say.
        error: why its controller does not answer, "" where it does.
        settings: `scontrol show config`.
        partitions: name, availability, nodes, generic resources and time limit of each.
    """

    missing: Sequence[str] = COMMANDS
    version: tuple[int, int] | None = None
    error: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    partitions: Sequence[tuple[str, ...]] = ()


def probe() -> SlurmFacts:
    """Ask Slurm's commands, each for some seconds at most."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        return SlurmFacts(missing)
    try:
        shown = ask(["scontrol", "show", "config"], ANSWERS_S)
        if shown is None or shown.code:
            return SlurmFacts((), error=shown.last_error if shown else "scontrol cannot be started")
        listed = ask(["sinfo", "--noheader", "--format=%P|%a|%D|%G|%l"], ANSWERS_S)
    except ProbeError as silent:
        return SlurmFacts((), error=str(silent))
    settings = parse_settings(shown.out)
    partitions = [tuple(line.split("|")) for line in listed.out.splitlines() if line.count("|") == 4] if listed else []
    return SlurmFacts((), parse_version(settings.get("SLURM_VERSION", "")), "", settings, partitions)


def parse_settings(text: str) -> dict[str, str]:
    """Names and values of `scontrol show config`."""
    pairs = (line.partition(" = ") for line in text.splitlines() if " = " in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def parse_version(text: str) -> tuple[int, int] | None:
    """(23, 11) of "23.11.4"."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _seconds(value: str) -> int | None:
    match = re.match(r"(\d+)\s*sec", value)
    return int(match[1]) if match else None


def check_slurm(facts: SlurmFacts, inside: str) -> list[Finding]:
    """Whether Slurm is here and answers, its version, and where this process runs.

    Args:
        facts: what was found out.
        inside: the job that this process belongs to, "" = none.
    """
    if len(facts.missing) == len(COMMANDS):
        where = f"; this process runs in job {inside}" if inside else ""
        return [skipped("Slurm", f"its commands are not here{where}")]
    if facts.missing:
        found = f"not here: {', '.join(facts.missing)}"
        return [warning("Slurm", found, "install the rest of slurm-client, or correct PATH (module load slurm)")]
    if "configuration source" in facts.error and not inside:
        return [skipped("Slurm", "its commands are here, but no cluster is configured")]
    if facts.error:
        remedy = "run this on a login or compute node of the cluster; `scontrol ping` says more"
        return [warning("Slurm", f"its controller does not answer: {facts.error}", remedy)]
    shown = facts.settings.get("SLURM_VERSION", "unknown version")
    place = f"in job {inside}" if inside else "outside of a job"
    if facts.version and facts.version < OLDEST:
        return [warning("Slurm", f"{shown} is older than 22.05", "submit by hand where `llara-dist submit` fails")]
    return [passed("Slurm", f"{shown}, {place}")]


def check_requeueing(settings: Mapping[str, str]) -> list[Finding]:
    """Whether a job that is told to stop can save, and comes back."""
    findings = []
    kill_wait = _seconds(settings.get("KillWait", ""))
    if kill_wait is not None and kill_wait < SAVING_S:
        found = f"KillWait={kill_wait} s between SIGTERM and SIGKILL: a checkpoint may not be done"
        remedy = "have the job warned earlier: sbatch --signal=B:USR1@300"
        findings.append(warning("time to save", found, remedy))
    if settings.get("JobRequeue") == "0":
        found = "JobRequeue=0: jobs that lose a node are not started again by themselves"
        findings.append(warning("requeueing", found, "submit with --requeue"))
    preemption = settings.get("PreemptMode", "OFF")
    if "CANCEL" in preemption:
        found = f"PreemptMode={preemption}: a pre-empted job is cancelled, not requeued"
        findings.append(warning("pre-emption", found, "start it again with --resume auto; take checkpoints often"))
    elif "SUSPEND" in preemption:
        found = f"PreemptMode={preemption}: a pre-empted job is suspended, its ranks may time out"
        findings.append(warning("pre-emption", found, "choose a partition whose jobs are requeued or never pre-empted"))
    exits = settings.get("RequeueExit", "(null)")
    if exits not in ("(null)", "") and 2 in _codes(exits):
        found = f"RequeueExit={exits} restarts jobs that end with 2, which is bad input"
        findings.append(warning("requeueing", found, "submit with --no-requeue while trying things out"))
    if not findings:
        waits = f", {kill_wait} s to save" if kill_wait is not None else ""
        findings.append(passed("requeueing", f"jobs come back; PreemptMode={preemption}{waits}"))
    return findings


def _codes(text: str) -> set[int]:
    """The numbers in "1,3-5"."""
    found: set[int] = set()
    for match in re.finditer(r"(\d+)(?:-(\d+))?", text):
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def check_partitions(partitions: Sequence[Sequence[str]], types: str, gpu_option: str) -> list[Finding]:
    """Partitions that take jobs, and whether Slurm knows the GPUs.

    Args:
        partitions: name (* = the default), availability, nodes, generic resources, time limit.
        types: GresTypes of Slurm's configuration.
        gpu_option: how the site file has GPUs asked for.
    """
    up = sorted({f"{name} (up to {limit})" for name, state, _, _, limit in partitions if state == "up"})
    if not up:
        return [error("partitions", "none takes jobs", "see `sinfo`")]
    more = f" and {len(up) - 4} more" if len(up) > 4 else ""
    findings = [passed("partitions", ", ".join(up[:4]) + more)]
    knows = "gpu" in types.split(",") or any(gres.startswith("gpu") for _, _, _, gres, _ in partitions)
    if not knows and gpu_option != "none":
        remedy = "write `gpus: none` into the site file, or have GresTypes=gpu configured"
        findings.append(warning("Slurm's GPUs", "Slurm knows of no GPUs: a job that asks for them is refused", remedy))
    return findings


def check_site(facts: SlurmFacts) -> tuple[list[Finding], str]:
    """Whether the site file reads; how it has GPUs asked for."""
    try:
        site = read_site()
    except InputError as problem:
        return [*findings_of("site file", problem)], "gpus-per-node"
    if facts.missing or facts.error:
        return [], site.gpus
    return [passed("site file", f"reads; GPUs are asked for by: {site.gpus}")], site.gpus


def check_shells() -> list[Finding]:
    """ssh and pdsh, by which DeepSpeed's launcher starts other nodes."""
    missing = [name for name in ("ssh", "pdsh") if shutil.which(name) is None]
    if not missing:
        return [passed("ssh, pdsh", "here, for `deepspeed --hostfile`")]
    return [skipped("ssh, pdsh", f"{' and '.join(missing)} not here: needed for `deepspeed --hostfile` only")]


def examine() -> list[Finding]:
    """The topic's findings."""
    facts = probe()
    findings = check_slurm(facts, read_job(os.environ).name)
    site, gpu_option = check_site(facts)
    if facts.settings:
        findings += check_requeueing(facts.settings)
        findings += check_partitions(facts.partitions, facts.settings.get("GresTypes", ""), gpu_option)
    return [*findings, *site, *check_shells()]
