"""Slurm's commands: sbatch, scontrol, scancel, sacct; what they are asked and what their answers mean."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llara_dist.errors import InputError

ANSWER_S = 120.0
"""For so long Slurm's controller may take to answer: a busy one takes a minute."""
OVER = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
"""States that a job does not leave; one that is requeued is in one of them for a moment."""
_OF_ANOTHER_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job, or of one or several tasks of an array.

    Attributes:
        job_id: "1234", of an array's tasks "1234_7" or "1234_[8-99]".
        state: in Slurm's words, e.g. PENDING.
        reason: why it waits or ended; "" where Slurm gives none.
        nodes: that it runs or ran on, as a host list.
        restarts: how often it was requeued; None where that is not known.
        exit_code: of the batch script and the signal that ended it, "75:0".
    """

    job_id: str
    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int | None = None
    exit_code: str = ""

    @property
    def is_over(self) -> bool:
        """Whether it has ended for good."""
        return self.state in OVER


def is_here() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def submit(script: Path, options: Sequence[str], environment: Mapping[str, str]) -> str:
    """Submit a batch script; returns the job's id.

    Raises:
        InputError: Slurm refuses; its words.
    """
    answer = _ask("sbatch", "--parsable", *options, str(script), environment=environment)
    number = answer.strip().splitlines()[-1].partition(";")[0]  # the cluster's name may follow
    if not number.isdecimal():
        raise InputError(f"sbatch: answered {answer.strip()!r}, expected a job's id")
    return number


def validate(script: str, options: Sequence[str], environment: Mapping[str, str]) -> str:
    """Let Slurm look at a job without submitting it; returns when and where it would start.

    Raises:
        InputError: Slurm would refuse it; its words.
    """
    return _ask("sbatch", "--test-only", *options, environment=environment, script=script)


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """A job's environment: without what another job or launcher, from which it is submitted, set for itself."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _OF_ANOTHER_LAUNCH and (not name.startswith("SLURM_") or name == "SLURM_CONF")
    }


def cluster_name() -> str:
    """The cluster's name; "" where Slurm does not say."""
    match = re.search(r"^ClusterName\s*=\s*(\S+)", _ask("scontrol", "show", "config"), re.MULTILINE)
    return match[1] if match else ""


def job_states(job_id: str, folder: Path) -> list[JobState]:
    """What is known of a job: from the controller, after some minutes only from accounting, where there is any.

    Args:
        job_id: "1234" or "1234_7".
        folder: that the job works in. Ids begin anew when they run out and on another cluster: a job of another folder
            is not the one that is meant.

    Returns:
        One for a job, any number for an array; empty where Slurm knows nothing (more).
    """
    try:
        answer = _ask("scontrol", "--oneliner", "show", "job", job_id)
    except UnknownJobError:
        answer = ""
    return parse_jobs(answer, folder) or _from_accounting(job_id, folder)


def parse_jobs(answer: str, folder: Path) -> list[JobState]:
    """What `scontrol --oneliner show job` says of the jobs of a folder."""
    states = []
    for line in answer.splitlines():
        if f" WorkDir={folder} " not in f"{line} ":
            continue
        # The first of a name counts: a path that looks like a field comes after all that are read here.
        fields = dict(reversed(re.findall(r"(?<!\S)(\w+)=(\S*)", line)))
        job_id = fields["JobId"]
        if "ArrayTaskId" in fields:
            tasks = fields["ArrayTaskId"].partition("%")[0]
            job_id = f"{fields['ArrayJobId']}_{tasks if tasks.isdecimal() else f'[{tasks}]'}"
        plain = {name: "" if value in ("None", "(null)") else value for name, value in fields.items()}
        states.append(
            JobState(
                job_id,
                plain["JobState"],
                plain.get("Reason", ""),
                plain.get("NodeList", ""),
                int(plain["Restarts"]) if plain.get("Restarts", "").isdecimal() else None,
                plain.get("ExitCode", ""),
            )
        )
    return states


def _from_accounting(job_id: str, folder: Path) -> list[JobState]:
    if shutil.which("sacct") is None:
        return []
    columns = "JobID,State,ExitCode,NodeList,WorkDir"
    try:
        answer = _ask("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", f"--format={columns}")
    except InputError:
        return []  # a site without accounting
    return parse_accounting(answer, folder)


def parse_accounting(answer: str, folder: Path) -> list[JobState]:
    """What `sacct --parsable2` says, by JobID, State, ExitCode, NodeList, WorkDir, of the jobs of a folder."""
    states = []
    for line in answer.splitlines():
        job_id, state, exit_code, nodes, work_dir = line.split("|", 4)
        if work_dir == str(folder):
            nodes = "" if nodes == "None assigned" else nodes
            # "CANCELLED by 1000"
            states.append(JobState(job_id, state.split()[0], nodes=nodes, exit_code=exit_code))
    return states


def jobs_in(folder: Path) -> list[str]:
    """Ids of this user's waiting and running jobs that work in a folder, found without knowing an id."""
    answer = _ask("squeue", "--me", "--noheader", "--format=%i|%Z")
    pairs = (line.split("|", 1) for line in answer.splitlines())
    return [job_id for job_id, work_dir in pairs if work_dir == str(folder)]


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs, pending and running; those that are over are left as they are.

    Raises:
        InputError: Slurm refuses, e.g. because a job is another user's; its words.
    """
    _ask("scancel", *job_ids)


class UnknownJobError(InputError):
    """Slurm knows no such job, or not any more."""


def _ask(command: str, *arguments: str, environment: Mapping[str, str] | None = None, script: str = "") -> str:
    """Run one of Slurm's commands; returns what it prints, of `sbatch --test-only` what it prints on stderr.

    Raises:
        UnknownJobError: Slurm knows no such job.
        InputError: there is no such command here, it fails, or the controller does not answer.
    """
    if shutil.which(command) is None:
        raise InputError(
            f"no Slurm here: {command} not found; run this on a login node of the cluster, or add Slurm's commands to "
            "PATH"
        )
    fixed = {"SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"} if command != "sbatch" else {}
    try:
        done = subprocess.run(
            [command, *arguments],
            env={**(os.environ if environment is None else environment), **fixed},
            input=os.fsencode(script),
            capture_output=True,
            timeout=ANSWER_S,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{command}: no answer in {ANSWER_S:.0f} s; try again when Slurm's controller is back"
        ) from None
    output, said = os.fsdecode(done.stdout), os.fsdecode(done.stderr)
    if done.returncode == 0:
        return output or said
    # Of a job that it has forgotten scontrol says so in one of two ways, of an array's task on stdout.
    lines = [line.strip() for line in (said.strip() or output).splitlines() if line.strip()]
    words = "; ".join(lines) or f"exit code {done.returncode}"
    if re.search(r"Invalid job id|Job \S+ not found", words):
        raise UnknownJobError(f"{command}: {words}")
    raise InputError(f"{command}: {words}")
