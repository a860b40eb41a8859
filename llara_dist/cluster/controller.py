"""The job that this process runs in, as Slurm's controller sees it; asked with patience, for it may be busy."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

PATIENCE_S = 90.0
_PAUSE_S = 3.0
_PASSES = re.compile(r"contact slurm|timed out|time-?out|connect|zero bytes|temporar|try again|busy", re.IGNORECASE)
_UNUSABLE = re.compile(r"down|drain|fail|maint|unk|inval|reboot|future|blocked|\*$")
_NONE = ("", "(null)", "None", "N/A")


class ControllerError(RuntimeError):
    """Slurm refused, or did not answer for a long time; its words."""


@dataclass(frozen=True)
class JobStatus:
    """What decides whether a job may be started again.

    Attributes:
        state: in Slurm's words; COMPLETING while it is being ended, by whomever.
        reason: TimeLimit where that is why; nothing tells a user's scancel from Slurm's own requeueing.
        requeue: whether it may be requeued at all.
        partition: that it runs in.
        nodes: their list, as Slurm writes it; so the next two.
        excluded: that it must not have.
        required: that it must have.
    """

    state: str
    reason: str
    requeue: bool
    partition: str
    nodes: str
    excluded: str
    required: str

    @property
    def is_ours(self) -> bool:
        """Whether it is this job's own business to go on.

        So it is while it runs, pre-emption's time of grace included, and when it ran into its time limit. A job that is
        being ended otherwise was cancelled, or Slurm requeues it by itself (pre-emption, a lost node).
        """
        return self.state == "RUNNING" or self.reason == "TimeLimit"


def parse_status(answer: str) -> JobStatus:
    """What `scontrol show job` says, in its form of several lines.

    The first line holds the job's name, the last ones its paths: free text, which might look like a field.

    Raises:
        KeyError: a field is missing.
    """
    fields: dict[str, str] = {}
    for name, value in re.findall(r"(\w+)=(\S*)", answer.partition("\n")[2]):
        fields.setdefault(name, "" if value in _NONE else value)
    return JobStatus(
        state=fields["JobState"],
        reason=fields["Reason"],
        requeue=fields["Requeue"] != "0",
        partition=fields["Partition"],
        nodes=fields["NodeList"],
        excluded=fields["ExcNodeList"],
        required=fields["ReqNodeList"],
    )


def own_job_id(environment: Mapping[str, str]) -> str:
    """How this job is named to Slurm: "1234", a task of an array "1234_7".

    Each task has a number of its own, but the last one's is the array's, which to Slurm means all tasks.

    Args:
        environment: the job's.

    Raises:
        KeyError: there is no SLURM_JOB_ID.
    """
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment["SLURM_JOB_ID"]


class Controller:
    """Slurm's controller, for one job.

    Args:
        job_id: as `own_job_id` gives it; an array's would mean all its tasks.
        patience_s: for so long a controller that does not answer is asked again.
    """

    def __init__(self, job_id: str, patience_s: float = PATIENCE_S) -> None:
        self.job_id = job_id
        self._patience_s = patience_s

    def status(self) -> JobStatus:
        """The job as it is now.

        Raises:
            ControllerError: it cannot be known.
        """
        answer = self._ask("scontrol", "show", "job", self.job_id)
        if len(re.findall(r"^JobId=", answer, re.MULTILINE)) > 1:
            raise ControllerError(f"scontrol show job {self.job_id}: several jobs have this id")
        try:
            return parse_status(answer)
        except KeyError as error:
            raise ControllerError(f"scontrol show job {self.job_id}: says nothing of {error}") from None

    def requeue(self) -> None:
        """Put the job back into the queue, under the same id; its processes are ended.

        Raises:
            ControllerError: Slurm refuses.
        """
        self._ask("scontrol", "requeue", self.job_id)

    def exclude(self, nodes: str) -> None:
        """Let the job never have these nodes again; it must be pending.

        Args:
            nodes: all that it must not have, as a list.

        Raises:
            ControllerError: Slurm refuses.
        """
        self._ask("scontrol", "update", f"JobId={self.job_id}", f"ExcNodeList={nodes}")

    def hosts(self, nodes: str) -> tuple[str, ...]:
        """The single names of a list of nodes, in order.

        Raises:
            ControllerError: Slurm does not know such a list.
        """
        return tuple(self._ask("scontrol", "show", "hostnames", nodes).split()) if nodes else ()

    def usable(self, *, partition: str = "", nodes: str = "") -> set[str]:
        """The nodes of a partition, or of a list, that are neither down nor drained nor silent.

        Raises:
            ControllerError: it cannot be known.
        """
        place = f"--partition={partition}" if partition else f"--nodes={nodes}"
        answer = self._ask("sinfo", "--noheader", "--Node", place, "--format=%N %T")
        pairs = (line.split() for line in answer.splitlines() if line.strip())
        return {name for name, state in pairs if not _UNUSABLE.search(state.lower())}

    def _ask(self, *command: str) -> str:
        """Run a command; one that fails because the controller does not answer is tried again."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                done = subprocess.run(command, capture_output=True, text=True, env=_plain(os.environ), timeout=60)
                failed, said = done.returncode != 0, " ".join(done.stderr.split())
            except subprocess.TimeoutExpired:
                done, failed, said = None, True, "timed out"
            except OSError as error:
                raise ControllerError(f"{command[0]}: {error.strerror}") from None
            if done is not None and not failed:
                return done.stdout
            if not _PASSES.search(said) or time.monotonic() > deadline:
                raise ControllerError(f"{' '.join(command[:2])}: {said}")
            time.sleep(_PAUSE_S)


def _plain(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what changes the form of answers, and without the job's own filters of them."""
    formats = ("SINFO_", "SQUEUE_", "SCONTROL_")
    return {**{k: v for k, v in environment.items() if not k.startswith(formats)}, "SLURM_TIME_FORMAT": "standard"}
