"""Jobs on their way into the queue: looked at by Slurm, written down, submitted; all of them or none."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llara_dist
from llara_dist.cluster import records, slurm
from llara_dist.cluster.batch_script import JobDescription, sbatch_options, script_text
from llara_dist.cluster.records import JobRecord
from llara_dist.cluster.site import Site
from llara_dist.console import say
from llara_dist.errors import InputError
from llara_dist.integrity import write_file


@dataclass(frozen=True)
class Submission:
    """A job and what lies beside it.

    Attributes:
        job: its description.
        step: of a pipeline; a single job's command.
        runs: folder of the run by array index, relative to the folder that `jobs` lies in.
        files: texts to write into the job's folder, by name.
        settings: hash of what the job's artifact depends on, by which a pipeline knows it again; "" of a single run.
    """

    job: JobDescription
    step: str
    runs: Mapping[str, str]
    files: Mapping[str, str]
    settings: str = ""


def checkout() -> Path | None:
    """The folder to import this package from where it is not installed."""
    root = Path(llara_dist.__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() else None


def enqueue(
    submissions: Sequence[Submission], site: Site, environment: Mapping[str, str], dry_run: bool
) -> dict[str, Any]:
    """Let Slurm look at every job, then submit them in order; all of them or none.

    Args:
        submissions: `after` of their jobs names earlier steps, whose ids take their place.
        site: of the cluster.
        environment: of the jobs.
        dry_run: print instead.

    Raises:
        InputError: Slurm refuses one; none is left queued, no folder left behind.
    """
    for submission in submissions:
        look_at(submission, site, environment, dry_run)
    if dry_run:
        return {"jobs": [_shown(submission, "") for submission in submissions]}
    cluster = slurm.cluster_name()
    submitted: dict[str, str] = {}
    made: list[Path] = []
    try:
        for submission in submissions:
            records.make_folder(submission.job.folder)
            made.append(submission.job.folder)
        for submission in submissions:
            record = _write(submission, site, cluster, submitted)
            folder = submission.job.folder
            job_id = submitted[submission.step] = slurm.submit(submission.job.script, record.sbatch, environment)
            records.write_record(folder, dataclasses.replace(record, job_id=job_id))
    except BaseException:  # Ctrl-C as well: no half of a pipeline stays queued
        # What went wrong first is what is said. A busy controller may have taken a job without saying so.
        for folder in made:
            with contextlib.suppress(InputError):
                if queued := {*submitted.values(), *slurm.jobs_in(folder)}:
                    slurm.cancel(sorted(queued))
            submitted.clear()
            records.remove_folder(folder)
        raise
    shown = [_shown(submission, submitted[submission.step]) for submission in submissions]
    for job in shown:
        say(f"{job['step']}: job {job['id']}, script {job['script']}, output {job['output']}")
    return {"jobs": shown}


def look_at(submission: Submission, site: Site, environment: Mapping[str, str], show: bool) -> None:
    """Let Slurm look at a job without submitting it, where there is Slurm; print it if asked.

    Raises:
        InputError: Slurm would refuse it; its words.
    """
    # What it waits for has no id yet.
    job = dataclasses.replace(submission.job, after=())
    script = script_text(job, site)
    if show:
        after = f", after {', '.join(submission.job.after)}" if submission.job.after else ""
        say(f"# {submission.step}: {job.script}{after}\n{script}")
    if slurm.is_here():
        answer = slurm.validate(script, sbatch_options(job, site), environment)
        if show:
            say(f"# {answer.strip()}\n")


def _write(submission: Submission, site: Site, cluster: str, submitted: Mapping[str, str]) -> JobRecord:
    """Write a job's folder, in which only the job's id is missing; returns the record."""
    job = dataclasses.replace(submission.job, after=tuple(submitted[step] for step in submission.job.after))
    for name, text in submission.files.items():
        write_file(job.folder / name, text)
    site_file = job.folder / "site.yaml"
    site_file.touch(mode=0o600)  # its variables may be secrets, and run folders are shared
    site_file.write_text(site.to_yaml(), encoding="utf-8")
    write_file(job.script, script_text(job, site))
    record = JobRecord(
        job_id="",
        cluster=cluster,
        step=submission.step,
        command=job.command,
        runs=dict(submission.runs),
        output=job.output,
        sbatch=tuple(sbatch_options(job, site)),
        settings=submission.settings,
        submitted_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    records.write_record(job.folder, record)
    return record


def _shown(submission: Submission, job_id: str) -> dict[str, str]:
    job = submission.job
    output = re.sub("%[jA]", lambda _: job_id, job.output) if job_id else job.output
    return {
        "id": job_id,
        "step": submission.step,
        "script": str(job.script),
        "output": str(job.folder / output),
    }
