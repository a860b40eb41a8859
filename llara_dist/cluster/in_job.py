"""What a batch script runs inside its job: a command over the job's tasks, started again by itself where that helps.

usage: python -m llara_dist.cluster.in_job COMMAND [options], those of `llara-dist`

`train` and `evaluate` run as every task of the job, any other command as one. A run that was told to stop (SIGUSR1
before the time limit, pre-emption) or lost a rank is put back into the queue under the job's own id, without the node
that failed; a user's scancel ends it, with its checkpoint. A rank that ends before the run has begun ends it for all,
or costs its node where the fault is that node's alone. Exit codes are the run's.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from llara_dist.cluster.controller import Controller, ControllerError, JobStatus, own_job_id
from llara_dist.cluster.lost_nodes import nodes_at_fault, nodes_that_failed_alone, nodes_to_exclude, records_of_start
from llara_dist.cluster.requeues import (
    IDLE_REQUEUES,
    Requeue,
    idle_requeues,
    newest_step,
    read_requeues,
    record_requeue,
)
from llara_dist.cluster.site import read_site
from llara_dist.cluster.step import Step, step_command, step_environment
from llara_dist.config import RunConfig
from llara_dist.console import say
from llara_dist.distributed import Job, read_job
from llara_dist.errors import EXIT_BAD_INPUT, EXIT_RANK_LOST, EXIT_REQUEUE, InputError
from llara_dist.supervision.early_end import EarlyEnd
from llara_dist.supervision.rank_status import RankRecord
from llara_dist.supervision.restarts import read_starts
from llara_dist.supervision.stop_signals import ignore_stop_signals

Ending = Literal["done", "stopped", "lost", "failed"]


@dataclass(frozen=True)
class LastWords:
    """What is known of the ranks of a start that has ended.

    Attributes:
        records: every rank's last word, once the run had begun.
        early: the ranks that ended before it had.
        silence_tells: whether it means anything that ranks said nothing: not where srun itself was killed.
    """

    records: Sequence[RankRecord] = ()
    early: Sequence[EarlyEnd] = ()
    silence_tells: bool = True


def run_folder(command: Sequence[str]) -> Path:
    """OUT of a `train` command: the last of its --out options and its configuration files that says so.

    A file that cannot be read says nothing here; the command itself says what is wrong with it.
    """
    out = RunConfig.out
    words = iter(command[1:])
    for word in words:
        option, equals, value = word.partition("=")
        if option not in ("--out", "--config"):
            continue
        value = value if equals else next(words, "")
        if option == "--out":
            out = Path(value)
            continue
        try:
            settings = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(settings, dict) and "out" in settings:
            out = Path(str(settings["out"]))
    return out


def resumable(command: Sequence[str], started: bool) -> list[str]:
    """A `train` command that goes on from its checkpoints.

    Args:
        command: as given; what it says of --resume holds for the first start.
        started: whether an earlier start of the same job did: the checkpoints are its own.
    """
    if command[0] != "train":
        return list(command)
    resume = ("--resume", "auto")
    return [*command, *resume] if started else [command[0], *resume, *command[1:]]


def ending(code: int, asked: bool) -> Ending:
    """What became of a run.

    Args:
        code: of srun: the highest of its tasks', 128 + n of one that signal n ended; negative: srun itself was killed.
        asked: whether the tasks were told to stop: before they listen, that kills them.
    """
    if code == 0:
        return "done"
    if code == EXIT_REQUEUE or (asked and (code < 0 or code >= 128)):
        return "stopped"
    return "lost" if code == EXIT_RANK_LOST or code < 0 or code >= 128 else "failed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code of the run."""
    command = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not command:
            raise InputError("in_job: no command; usage: python -m llara_dist.cluster.in_job COMMAND [options]")
        job, site = read_job(), read_site()
        if not job.name:
            raise InputError("in_job: not inside a Slurm job (SLURM_JOB_ID is not set); start it through sbatch")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    out = run_folder(command) if command[0] == "train" else None
    started = out is not None and any(start.job == job.name for start in read_starts(out))
    environment = step_environment(site, os.environ, out, job)
    words = step_command(resumable(command, started), site, environment)
    try:
        step = Step(words, environment, out, job)
    except OSError as error:
        print(f"error: {words[0]}: {error.strerror}; start it inside a Slurm job", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    code = step.wait()
    ended = ending(code, step.asked)
    if out is not None and ended != "done":
        ignore_stop_signals()  # Slurm sends them to a job that it requeues
        said = LastWords(silence_tells=False)
        if code >= 0:
            records = records_of_start(out, job)
            said = LastWords(records, [] if records else step.early_ends())
        try:
            go_on(out, job, ended, said, Controller(own_job_id(os.environ)))
        except (ControllerError, OSError) as error:
            say(f"llara-dist: not requeued: {error}")
    return code if code >= 0 else EXIT_RANK_LOST


def go_on(out: Path, job: Job, ended: Ending, said: LastWords, controller: Controller) -> None:
    """Put a run's job back into the queue where that helps, without the nodes that failed.

    Args:
        out: the run's folder.
        job: with this start's number.
        ended: how the run did.
        said: by the ranks.
        controller: of the job.

    Raises:
        ControllerError: Slurm refuses or does not answer.
        OSError: the run's folder cannot be written: requeues that nobody counts might never end.
    """
    status = controller.status()
    nodes = controller.hosts(status.nodes)
    usable = controller.usable(nodes=status.nodes)
    troubled = [node for node in nodes if node not in usable]
    failed_alone = nodes_that_failed_alone(said.early, nodes)
    done = newest_step(out)
    earlier = [requeue for requeue in read_requeues(out) if requeue.job == job.name]
    refused = no_use(ended, said, troubled, failed_alone) or refusal(status, idle_requeues(earlier, done), done)
    if refused is not None:
        say(f"llara-dist: not requeued: {refused}")
        return
    blamed: list[str] = []
    excluded: list[str] = []
    before = controller.hosts(status.excluded)
    if ended != "stopped":
        at_fault = {*nodes_at_fault(said.records, nodes), *failed_alone, *troubled}
        blamed = [node for node in nodes if node in at_fault]
        required = controller.hosts(status.required)
        excluded = nodes_to_exclude(
            [node for node in blamed if node not in required],
            nodes,
            usable=controller.usable(partition=status.partition) - set(before),
            ours={node for requeue in earlier for node in requeue.excluded},
        )
        if failed_alone and not excluded:
            say(f"llara-dist: not requeued: {', '.join(failed_alone)} failed, and too few nodes would be left without")
            return
    why = "stopped" if ended == "stopped" else "lost"
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record_requeue(out, Requeue(job.name, job.restart, done, why, tuple(blamed), tuple(excluded), now))
    say(f"llara-dist: requeueing ({why}), safe up to step {done}{_about(blamed, excluded)}")
    controller.requeue()
    # Only now: Slurm changes this of waiting jobs alone. One that is held meanwhile would stay so if this process were
    # killed in between; as it is, the worst is a start with the same nodes.
    if excluded:
        try:
            controller.exclude(",".join([*before, *excluded]))
        except ControllerError as error:
            say(f"llara-dist: requeued, but it may get {', '.join(excluded)} again: {error}")


def no_use(ended: Ending, said: LastWords, troubled: Sequence[str], failed_alone: Sequence[str]) -> str | None:
    """Why another start would end in the same way; None where it might not.

    Args:
        ended: how this one did.
        said: by the ranks.
        troubled: the job's nodes that are not usable any more.
        failed_alone: those of which ranks ended before the run began, and it is theirs alone.
    """
    if ended == "stopped" or failed_alone:
        return None
    bad_input = any(end.code == EXIT_BAD_INPUT for end in said.early)
    if bad_input or (ended == "failed" and (said.records or not troubled)) or (said.early and not troubled):
        return "it says above why it ended; a restart would find the same"
    if said.silence_tells and not (said.records or said.early or troubled):
        return "no rank got as far as to say anything, and no node is in trouble; find out why, then submit it again"
    return None


def refusal(status: JobStatus, idle: int, done: int) -> str | None:
    """Why a job is not put back into the queue; None where it is.

    Args:
        status: of the job.
        idle: requeues in a row that found no newer checkpoint.
        done: step of the newest checkpoint.
    """
    if not status.is_ours:
        return f"the job is being ended by a user, or by Slurm, which then requeues it itself (state {status.state})"
    if not status.requeue:
        return "the job was submitted with --no-requeue; submit it again to go on"
    if idle >= IDLE_REQUEUES:
        return f"{idle} times in a row that led to no checkpoint after step {done}; find out why, then submit it again"
    return None


def _about(blamed: Sequence[str], excluded: Sequence[str]) -> str:
    if not blamed:
        return ""
    kept = [node for node in blamed if node not in excluded]
    return (
        f"; lost on {', '.join(blamed)}"
        + (f", excluded from now on: {', '.join(excluded)}" if excluded else "")
        + (f", not excluded, too few nodes would be left: {', '.join(kept)}" if kept else "")
    )


if __name__ == "__main__":
    sys.exit(main())
