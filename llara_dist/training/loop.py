"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from llara_dist import distributed
from llara_dist.console import say
from llara_dist.errors import InputError
from llara_dist.supervision.progress import Phase
from llara_dist.training.between_steps import StoppedError, conclude, stop, validate
from llara_dist.training.debug import Debugger
from llara_dist.training.metrics_log import MetricsLog
from llara_dist.training.profile import Profiler
from llara_dist.training.run import Run
from llara_dist.training.step_metrics import StepMetrics
from llara_dist.training.trackers import open_trackers


def train_loop(
    run: Run,
    debugger: Debugger | None = None,
    profile: bool = False,
    stop_requested: Callable[[], bool] = lambda: False,
    lost: Callable[[], str | None] = lambda: None,
) -> dict[str, Any]:
    """Every optimizer step from `run.first_step` to T, or to the validation that ends the run early.

    Args:
        run: as `open_run` made it.
        debugger: looks at every step; None = off.
        profile: whether rank 0 writes a torch profiler trace of a few steps.
        stop_requested: whether this rank was asked to stop.
        lost: why this rank may write into the run's folder no more; None = it may.

    Raises:
        StoppedError: a rank was asked to stop, and a checkpoint is written.
        InputError: the folder is another's by now, or the last checkpoint could not be written.
        RunFailedError: too many steps were skipped.
    """
    out, is_main = run.config.out, run.engine.world.is_main
    if is_main and run.first_step >= run.total_steps:
        say(f"{out}: all {run.total_steps} steps are done already")
    with (
        MetricsLog(
            *(out, run.first_step, run.total_steps, is_main, run.validated),
            tensorboard=run.config.tracking.tensorboard,
            trackers=partial(open_trackers, run.config),
        ) as log,
        run.writer,  # left before the log is: a last checkpoint that cannot be written is how the run ended
        Profiler(out, run.engine.device, enabled=profile and is_main) as profiler,
    ):
        return {"out": str(out), **run_steps(run, log, profiler, debugger, stop_requested, lost)}


def run_steps(
    run: Run,
    log: MetricsLog,
    profiler: Profiler,
    debugger: Debugger | None,
    stop_requested: Callable[[], bool],
    lost: Callable[[], str | None],
) -> dict[str, Any]:
    """The steps themselves; returns how many were done in all, and the last one's loss (None where none was)."""
    loss: float | None = None
    done, phases = run.first_step, run.engine.phases
    metrics = StepMetrics(run)
    if any(distributed.gather_objects(stop_requested())):
        raise StoppedError(done)  # asked while the weights were loaded: there is nothing new to save
    if run.validations.owes(done):
        metrics.saving_s += validate(run, log, done)
    phases.enter(Phase.DATA, done)
    waiting_since = time.perf_counter()
    for step in () if run.validations.exhausted else run.loader:
        started = time.perf_counter()
        if debugger is not None:
            debugger.before(step)
        result = run.engine.train_step(step, *run.rates(step.index), votes=(stop_requested(), lost() is not None))
        run.faults.after(step, result)
        loss, done = result.loss, step.index + 1
        finished = time.perf_counter()
        if debugger is not None:
            debugger.after(step, result, finished - started)
        if log.enabled and run.log_due(step.index):
            log.write(metrics.row(step, result, wait_s=started - waiting_since, step_s=finished - started))
        is_asked, is_lost = result.votes
        if is_lost:
            raise InputError(lost() or f"{run.config.out}: another job has taken this run over", everywhere=False)
        if is_asked:
            stop(run, done)
        metrics.saving_s += conclude(run, log, done)
        if run.validations.exhausted:
            break
        profiler.step()
        phases.enter(Phase.DATA, done)
        waiting_since = time.perf_counter()
    phases.enter(Phase.CHECKPOINT, done)  # the last write may still be under way, for as long as the disk takes
    loss = loss if loss is None or math.isfinite(loss) else None
    return {"steps": done, "loss": loss, "stopped_early": run.validations.exhausted}
