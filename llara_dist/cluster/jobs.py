"""`llara-dist status`, `logs` and `cancel`: the jobs of a run or pipeline, from Slurm and from files."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llara_dist.cluster import slurm
from llara_dist.cluster.records import Job, active, jobs_of, states_of
from llara_dist.cluster.slurm import JobState
from llara_dist.console import say, table
from llara_dist.errors import InputError
from llara_dist.supervision.rank_logs import log_path
from llara_dist.supervision.rank_status import read_statuses
from llara_dist.training.checkpoints.folders import STATE, checkpoint_folders

LOOK_S = 1.0
"""seconds between looks at a file that is followed"""
ASK_S = 10.0
"""seconds between questions to Slurm whether the job that is followed is over"""
TAIL_BYTES = 1 << 16
"""so much of the end of metrics.jsonl holds its last line"""


def status(run: Path) -> dict[str, Any]:
    """The jobs of a run, an array or a pipeline in Slurm, and how far each run is.

    Where Slurm is missing, does not answer or has forgotten a job, the files alone say what they can.

    Args:
        run: a run's folder, or the one that an array or a pipeline was submitted into.

    Returns:
        "jobs": id, step, state, reason, nodes, restarts of each; "runs": step, of, loss, ranks, heartbeat of each.

    Raises:
        InputError: there is no such folder.
    """
    if not run.is_dir():
        raise InputError(f"{run}: no such folder; give the run's --out")
    jobs = jobs_of(run)
    shown, silent = [], ""
    for job in jobs:
        try:
            states = states_of(job)
        except InputError as error:
            states, silent = [], str(error)
        states = sorted(states, key=lambda state: [int(number) for number in re.findall(r"\d+", state.job_id)])
        shown += [_job_row(job, state) for state in states or [None]]
    folders = list(dict.fromkeys(folder for job in jobs for folder in _runs_seen_from(job, run))) or [run.resolve()]
    runs = [row for row in map(progress, folders) if row]
    if shown:
        columns = ("job", "step", "state", "reason", "nodes", "restarts", "exit")
        table(f"jobs of {run}", list(columns), ([_cell(row[name]) for name in columns] for row in shown))
    else:
        say(f"{run}: no job was submitted for it")
    if runs:
        columns = ("step", "of", "loss", "ranks", "phase", "heartbeat", "ended")
        base = run.resolve()
        table(
            f"progress of {run}",
            ["run", *columns],
            ([os.path.relpath(row["run"], base), *(_cell(row[name]) for name in columns)] for row in runs),
        )
    if silent:
        say(f"from files alone: {silent}")
    return {"run": str(run), "jobs": shown, "runs": runs}


def progress(run: Path) -> dict[str, Any] | None:
    """How far a run is, by its files; None where it has not begun.

    Returns:
        "step": optimizer steps done; "of": T, None while it is not known; "loss"; "ranks"; "phase", "heartbeat" and
        "ended" of rank 0: what it does, when it last said so, and how it ended: None while it works.
    """
    last = last_line(run / "metrics.jsonl")
    ranks = read_statuses(run)
    first = ranks[0] if ranks else None
    total = (first.total_steps if first else 0) or _total_steps(run)
    if not (last or ranks or total):
        return None
    return {
        "run": str(run),
        "step": last["step"] + 1 if last else 0,
        "of": total,
        "loss": last.get("loss") if last else None,
        "ranks": first.world_size if first else None,
        "phase": str(first.progress.phase) if first else None,
        "heartbeat": first.written_at if first else None,
        "ended": ("in order" if first.ended == "" else first.ended) if first else None,
    }


def logs(run: Path, rank: int | None = None, follow: bool = False, lines: int = 50) -> None:
    """Print the end of what a run's newest job printed, or of one rank's log.

    Args:
        run: a run's folder, or the one that an array or a pipeline was submitted into.
        rank: print this rank's log, OUT/logs/rank-00017.log, instead.
        follow: go on printing what is added, until the job is over or Ctrl-C.
        lines: of the end; 0 = everything.

    Raises:
        InputError: there is no such log, and none is to come.
    """
    if lines < 0:
        raise InputError(f"--lines {lines}: must not be negative")
    jobs = jobs_of(run)
    if rank is not None:
        # From a pipeline's folder, its run's rank is meant.
        folders = [run, *(folder for job in reversed(jobs) for folder in job.runs)]
        places = [log_path(folder, rank) for folder in folders]
        path = next((place for place in places if place.is_file()), places[0])
        missing = f"{path}: not found; the run has no rank {rank}, or has not started yet"
    else:
        if not jobs:
            raise InputError(f"{run}: no job was submitted for it; its ranks' logs are in {run / 'logs'}")
        written = [path for job in jobs for path in job.outputs if path.is_file()]
        # The job that printed last is the one to look at: a pipeline's later ones may still wait.
        path = max(written, key=lambda file: file.stat().st_mtime) if written else jobs[-1].outputs[0]
        missing = f"{path}: not there yet: job {jobs[-1].job_id} has not started; see `llara-dist status {run}`"
    if not path.is_file() and not (follow and _may_go_on(jobs)):
        raise InputError(missing)
    say(f"==> {path} <==")
    place = print_end(path, lines) if path.is_file() else 0
    if follow:
        follow_file(path, place, lambda: _may_go_on(jobs))


def cancel(run: Path) -> dict[str, Any]:
    """Cancel the jobs of a run, an array or a pipeline, waiting and running; one that is over is left as it is.

    A run that trains saves a checkpoint first and is not requeued; `llara-dist submit … --resume auto` goes on from it.

    Args:
        run: a run's folder, or the one that an array or a pipeline was submitted into.

    Returns:
        "cancelled": ids.

    Raises:
        InputError: there is no Slurm here, or it refuses.
    """
    jobs = jobs_of(run)
    if not jobs:
        raise InputError(f"{run}: no job was submitted for it")
    found = active(jobs)
    # The whole array, not its tasks as shown: long lists of them are cut short.
    ids = list(dict.fromkeys(job.job_id or state.job_id for job, state in found))
    if ids:
        slurm.cancel(ids)
    for job, state in found:
        say(f"{job.record.step}: cancelled job {state.job_id}, which was {state.state.lower()}")
    if not found:
        say(f"{run}: no job waits or runs; {len(jobs)} submitted, all over")
    return {"run": str(run), "cancelled": ids}


def last_line(path: Path) -> dict[str, Any] | None:
    """The last whole line of a metrics.jsonl, however long the file is; None where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            ends = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    for line in reversed(ends):
        try:
            row = json.loads(line)
        except ValueError:  # cut short, by a kill or by where reading began
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return None


def print_end(path: Path, lines: int) -> int:
    """Print the last lines of a file, 0 = all; returns how many bytes of it were read."""
    with open(path, "rb") as file:
        kept = deque(file, maxlen=lines or None)
        _print(b"".join(kept))
        return file.tell()


def follow_file(path: Path, place: int, may_go_on: Callable[[], bool]) -> None:
    """Print what is added to a file from `place` on, until nothing more is to come."""
    going, asked = True, -math.inf
    while True:
        if path.is_file():
            with open(path, "rb") as file:
                file.seek(place if place <= path.stat().st_size else 0)  # begun anew
                added = file.read()
                place = file.tell()
            _print(added)
            if added:
                continue
        if not going:
            return
        if time.monotonic() - asked >= ASK_S:
            # What was written until the answer is read once more.
            going, asked = may_go_on(), time.monotonic()
            continue
        time.sleep(LOOK_S)


def _may_go_on(jobs: list[Job]) -> bool:
    """Whether a job waits or runs; where Slurm cannot say, or nothing was submitted, yes."""
    try:
        return not jobs or bool(active(jobs))
    except InputError:
        return True


def _print(text: bytes) -> None:
    print(text.decode(errors="replace"), end="", flush=True)


def _runs_seen_from(job: Job, run: Path) -> list[Path]:
    """The runs of a job that lie in the folder asked for: of an array's one task its own."""
    return [folder.resolve() for folder in job.runs if folder.resolve().is_relative_to(run.resolve())]


def _job_row(job: Job, state: JobState | None) -> dict[str, Any]:
    """One line of the table of jobs; of a job that Slurm does not know (any more) only what was recorded."""
    found = state or JobState(job.job_id, "not known to Slurm")
    return {
        "job": found.job_id,
        "step": job.record.step,
        "state": found.state,
        "reason": found.reason,
        "nodes": found.nodes,
        "restarts": found.restarts,
        "exit": found.exit_code,
        "submitted": job.record.submitted_at,
        "output": [str(path) for path in job.outputs],
    }


def _total_steps(run: Path) -> int | None:
    """T, as the newest checkpoint says; it is not opened whole: hashing gigabytes is no matter of a look."""
    for folder in reversed(checkpoint_folders(run / "checkpoints")):
        try:
            return int(json.loads((folder / STATE).read_text(encoding="utf-8"))["total_steps"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "–" if value in (None, "") else str(value)
