"""What was submitted: FOLDER/jobs/3/job.json, beside the job's script, settings and output.

A job belongs to the folder that its `jobs` lies in, and to the runs that it names: a run's own job names ".", a
pipeline's train step "run", an array one run for each index.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from llara_dist.cluster import slurm
from llara_dist.cluster.slurm import JobState
from llara_dist.errors import InputError
from llara_dist.integrity import read_json, write_json

JOBS = "jobs"
RECORD = "job.json"


@dataclass(frozen=True)
class JobRecord:
    """One submission.

    Attributes:
        job_id: Slurm's number; "" until sbatch has answered.
        cluster: its name; "" where Slurm does not say.
        step: of a pipeline; a single job's command.
        command: words after `llara-dist`; an array's may hold {index}.
        runs: folder of the run by array index, relative to the folder that `jobs` lies in; index "" of a single job.
        output: name of the job's output, with Slurm's patterns.
        sbatch: options that it was submitted with.
        settings: hash of what a pipeline step's artifact depends on.
        submitted_at: local time with zone, for people.
    """

    job_id: str
    cluster: str
    step: str
    command: tuple[str, ...]
    runs: dict[str, str]
    output: str
    sbatch: tuple[str, ...]
    settings: str
    submitted_at: str


@dataclass(frozen=True)
class Job:
    """A submission as seen from one folder.

    Attributes:
        folder: of its files, absolute.
        record: what was submitted.
        index: the one task of an array that is meant; "" = all of it.
    """

    folder: Path
    record: JobRecord
    index: str = ""

    @property
    def job_id(self) -> str:
        """Slurm's id of the job or of the array's task; "" where sbatch's answer is missing."""
        return f"{self.record.job_id}_{self.index}" if self.record.job_id and self.index else self.record.job_id

    @property
    def outputs(self) -> list[Path]:
        """The files that the job writes or will write to: one, or one for each task of an array."""
        indices = [self.index] if self.index else list(self.record.runs)
        names = (
            self.record.output.replace("%j", self.record.job_id).replace("%A", self.record.job_id).replace("%a", index)
            for index in indices
        )
        return [self.folder / name for name in dict.fromkeys(names)]

    @property
    def runs(self) -> list[Path]:
        """The runs' folders, absolute."""
        base = self.folder.parents[1]
        return [base / run for index, run in self.record.runs.items() if self.index in ("", index)]


def next_folders(out: Path, count: int) -> list[Path]:
    """Where the next jobs of a folder go, absolute; not made."""
    last = max(_numbers(out), default=0)
    return [_jobs_folder(out) / str(last + number) for number in range(1, count + 1)]


def make_folder(folder: Path) -> None:
    """Make a job's folder.

    Raises:
        InputError: somebody else made it since `next_folders` found it free.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        raise InputError(f"{folder}: another submission is under way for this run; look at its jobs first") from None


def remove_folder(folder: Path) -> None:
    """Remove the folder of a job that was not submitted after all, and those above that hold nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for above in (folder.parent, folder.parents[1]):
        with contextlib.suppress(OSError):
            above.rmdir()


def write_record(folder: Path, record: JobRecord) -> None:
    """Write a job's record."""
    write_json(folder / RECORD, dataclasses.asdict(record))


def read_record(folder: Path) -> JobRecord:
    """Read a job's record.

    Raises:
        InputError: it is missing, or damaged.
    """
    path = folder / RECORD
    values = read_json(path, "what `llara-dist submit` wrote")
    try:
        command, sbatch = tuple(values.pop("command")), tuple(values.pop("sbatch"))
        return JobRecord(**values, command=command, sbatch=sbatch)
    except (TypeError, KeyError):
        raise InputError(f"{path}: not written by `llara-dist submit`; remove it") from None


def jobs_of(folder: Path) -> list[Job]:
    """Every job that a folder has to do with, oldest first: those in its `jobs`, and those above that name it."""
    folder = Path(folder).resolve()
    found = [Job(path, read_record(path)) for path in _recorded(folder)]
    for above in folder.parents:
        for path in _recorded(above):
            with contextlib.suppress(InputError, OSError):  # far above, `jobs` may be anybody's
                record = read_record(path)
                named = [index for index, run in record.runs.items() if (above / run).resolve() == folder]
                found += [Job(path, record, index) for index in named]
    return sorted(found, key=lambda job: job.record.submitted_at)


def states_of(job: Job) -> list[JobState]:
    """What Slurm knows of a job; empty where it knows nothing (more).

    Raises:
        InputError: there is no Slurm here, or it does not answer.
    """
    if job.job_id:
        return slurm.job_states(job.job_id, job.folder)
    # Submitting was cut off between sbatch and the record: a job of this folder may be there all the same.
    return [state for job_id in slurm.jobs_in(job.folder) for state in slurm.job_states(job_id, job.folder)]


def active(jobs: list[Job]) -> list[tuple[Job, JobState]]:
    """The jobs that wait or run."""
    return [(job, state) for job in jobs for state in states_of(job) if not state.is_over]


def require_no_active(folder: Path) -> None:
    """Refuse to submit for a folder whose job waits or runs.

    Raises:
        InputError: it has one; names it.
    """
    for job, state in active(jobs_of(folder)):
        raise InputError(
            f"{folder}: job {state.job_id} ({job.record.step}) is {state.state.lower()}; wait until it has ended, or "
            f"`llara-dist cancel {folder}`"
        )


def _jobs_folder(out: Path) -> Path:
    return Path(out).resolve() / JOBS


def _numbers(out: Path) -> list[int]:
    try:
        names = os.listdir(_jobs_folder(out))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    return sorted(int(name) for name in names if name.isdecimal())


def _recorded(out: Path) -> list[Path]:
    folders = (_jobs_folder(out) / str(number) for number in _numbers(out))
    # Unlike Path.is_file, this says of another user's folder that there is none.
    return [folder for folder in folders if os.path.isfile(folder / RECORD)]
