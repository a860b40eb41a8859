"""`llara-dist submit`: a run, an array of runs or a whole pipeline as jobs of a Slurm cluster."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llara_dist.cluster import records, slurm
from llara_dist.cluster.batch_script import INDEX, JobDescription, Resources, array_indices
from llara_dist.cluster.pipeline import pipeline_submissions
from llara_dist.cluster.run_settings import check_run, require_own_folder, settings_files
from llara_dist.cluster.site import read_site
from llara_dist.cluster.submission import Submission, checkout, enqueue
from llara_dist.config import RunConfig, to_dict
from llara_dist.errors import InputError


def submit(
    config: RunConfig,
    nodes: str = "1",
    gpus_per_node: int = 1,
    time: str = "",
    partition: str = "",
    account: str = "",
    qos: str = "",
    constraint: str = "",
    cpus_per_task: int = 0,
    mem: str = "",
    job_name: str = "",
    array: str = "",
    signal_s: int = 300,
    pipeline: Path | None = None,
    check: bool = True,
    dry_run: bool = False,
    runs: Mapping[str, RunConfig] | None = None,
) -> dict[str, Any]:
    """Submit a run to Slurm: checked here first, then written to OUT/jobs/N and queued from there.

    The job keeps the settings of this moment: files that are edited while it waits do not change it. It is requeued
    when it is pre-empted, runs into its time limit or loses a node, and goes on from its newest checkpoint. What the
    cluster wants of every job (account, modules, containers) is said once in ~/.config/llara-dist/site.yaml.

    Args:
        config: the run.
        nodes: how many, or a range such as 2-4 from which the run may be started.
        gpus_per_node: GPUs, and processes, on each node.
        time: limit of one start: minutes, H:M:S or D-H:M:S.
        partition: where the job goes; the site's by default, as the next three.
        account: to charge.
        qos: quality of service.
        constraint: features of the nodes.
        cpus_per_task: cores of each process; 0 = Slurm's choice.
        mem: memory of each node, e.g. 200G.
        job_name: shown by squeue; by default the name of the run's folder.
        array: one run an index, e.g. 0-4 or 0-99%4; {index} in options stands for it, and must be in --out.
        signal_s: so many seconds before the time limit the run saves and is requeued; 0 = never.
        pipeline: submit the steps of this file instead (see launch/pipelines), into --out.
        check: look at the run as `llara-dist preflight` does, as far as that holds on a login node.
        dry_run: write and submit nothing; print the script, and what Slurm says of it where there is Slurm.
        runs: of an array, the run of each index.

    Returns:
        "jobs": id, step, script and output of each job.

    Raises:
        InputError: bad settings; the run has a job already; there is no Slurm, or Slurm refuses: its words.
    """
    environment = slurm.clean_environment(os.environ)  # before libraries add their own
    site = read_site()
    if not dry_run and not slurm.is_here():
        slurm.cluster_name()  # says what is missing
    resources = Resources(nodes, gpus_per_node, cpus_per_task, mem, time, partition, account, qos, constraint)
    if pipeline is not None:
        given = (dataclasses.replace(config, out=Path()), resources, array, job_name, signal_s)
        if given != (RunConfig(out=Path()), Resources(gpus_per_node=1), "", "", 300):
            raise InputError(f"--pipeline {pipeline}: settings and resources belong to its steps; give --out alone")
        if slurm.is_here():
            records.require_no_active(config.out)
        submissions = pipeline_submissions(pipeline, config.out, check)
    else:
        submissions = [run_submission(runs or {"": config}, resources, array, job_name, signal_s, check)]
    return enqueue(submissions, site, environment, dry_run)


def run_submission(
    runs: Mapping[str, RunConfig],
    resources: Resources,
    array: str,
    job_name: str,
    signal_s: int,
    check: bool,
) -> Submission:
    """A run's job, or the array of several runs', checked.

    Raises:
        InputError: bad settings; a run has a job already; two runs of an array share a folder.
    """
    outs = {index: config.out.resolve() for index, config in runs.items()}
    if array and len(set(outs.values())) < len(array_indices(array)):
        raise InputError(f"--array {array}: one folder, one run: put {INDEX} into --out, e.g. --out runs/seed-{INDEX}")
    for out in outs.values():
        if slurm.is_here():
            records.require_no_active(out)
    for config in runs.values():
        config.require_inputs()
        require_own_folder(config)
    if check:
        # Of an array's runs those that differ in more than folder and seed.
        different = {json.dumps(to_dict(dataclasses.replace(c, out=Path(), seed=0))): c for c in runs.values()}
        for config in different.values():
            check_run(config, resources)
    # An array's job lies beside its runs.
    base = Path(os.path.commonpath([out.parent for out in outs.values()])) if array else outs[""]
    folder = records.next_folders(base, 1)[0]
    files = {}
    for index, config in runs.items():
        suffix = f"-{index}" if index else ""
        files |= settings_files(config, folder, suffix)
    command = ("train", "--config", str(folder / (f"run-{INDEX}.yaml" if array else "run.yaml")), "--resume", "auto")
    job = JobDescription(
        job_name or base.name, command, folder, Path.cwd(), resources, array, signal_s, source=checkout()
    )
    return Submission(job, "train", {index: os.path.relpath(out, base) for index, out in outs.items()}, files)
