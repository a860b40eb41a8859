"""The training loop."""

from __future__ import annotations

import time
from typing import Any

from llara_dist.console import say
from llara_dist.training.debug import Debugger
from llara_dist.training.metrics_log import MetricsLog
from llara_dist.training.profile import Profiler
from llara_dist.training.run import Run
from llara_dist.training.step_metrics import step_row


def train_loop(run: Run, debugger: Debugger | None = None, profile: bool = False) -> dict[str, Any]:
    """Every optimizer step from `run.first_step` to T.

    Args:
        run: as `open_run` made it.
        debugger: looks at every step; None = off.
        profile: whether rank 0 writes a torch profiler trace of a few steps.
    """
    out, is_main = run.config.out, run.engine.world.is_main
    with (
        MetricsLog(out, run.first_step, run.total_steps, enabled=is_main) as log,
        Profiler(out, run.engine.device, enabled=profile and is_main) as profiler,
    ):
        loss = run_steps(run, log, profiler, debugger)
    if run.first_step >= run.total_steps and is_main:
        say(f"{out}: all {run.total_steps} steps are done already")
    return {"out": str(out), "steps": run.total_steps, "loss": loss}


def run_steps(run: Run, log: MetricsLog, profiler: Profiler, debugger: Debugger | None) -> float | None:
    """The steps themselves; returns the last one's loss, None where there was none to run."""
    loss: float | None = None
    waiting_since = time.perf_counter()
    for step in run.loader:
        started = time.perf_counter()
        if debugger is not None:
            debugger.before(step)
        lora_lr, projector_lr = run.rates(step.index)
        result = run.engine.train_step(step, lora_lr, projector_lr)
        run.faults.after(step, result)
        loss = result.loss
        finished = time.perf_counter()
        if debugger is not None:
            debugger.after(step, result, finished - started)
        if run.log_due(step.index):
            log.write(step_row(run, step, result, wait_s=started - waiting_since, step_s=finished - started))
        if run.checkpoint_due(step.index + 1):
            run.save(step.index + 1)
        profiler.step()
        waiting_since = time.perf_counter()
    return loss
