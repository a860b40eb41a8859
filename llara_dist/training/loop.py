"""The training loop."""

from __future__ import annotations

import time
from typing import Any

from llara_dist.console import say
from llara_dist.training.debug import Debugger
from llara_dist.training.memory import peak_memory_mib
from llara_dist.training.metrics_log import MetricsLog
from llara_dist.training.run import Run


def train_loop(run: Run, debugger: Debugger | None = None) -> dict[str, Any]:
    """Every optimizer step from `run.first_step` to T.

    Args:
        run: as `open_run` made it.
        debugger: looks at every step; None = off.
    """
    with MetricsLog(run.config.out, run.first_step, run.total_steps, enabled=run.engine.world.is_main) as log:
        loss = run_steps(run, log, debugger)
    if run.first_step >= run.total_steps and run.engine.world.is_main:
        say(f"{run.config.out}: all {run.total_steps} steps are done already")
    return {"out": str(run.config.out), "steps": run.total_steps, "loss": loss}


def run_steps(run: Run, log: MetricsLog, debugger: Debugger | None) -> float | None:
    """The steps themselves; returns the last one's loss, None where there was none to run."""
    loss: float | None = None
    waiting_since = time.perf_counter()
    for step in run.loader:
        started = time.perf_counter()
        if debugger is not None:
            debugger.before(step)
        lora_lr, projector_lr = run.rates(step.index)
        result = run.engine.train_step(step, lora_lr, projector_lr)
        loss = result.loss
        finished = time.perf_counter()
        if debugger is not None:
            debugger.after(step, result, finished - started)
        if step.index % run.config.log_every_steps == 0 or step.index + 1 == run.total_steps:
            log.write(
                {
                    "step": step.index,
                    "epoch": step.epoch,
                    "loss": loss,
                    "p": run.curriculum.probability(step.index),
                    "hybrid_share": step.hybrid_samples / step.samples,
                    "lora_lr": lora_lr,
                    "projector_lr": projector_lr,
                    "grad_norm": result.grad_norm,
                    "samples": step.samples,
                    "tokens": step.tokens,
                    "microbatches": len(step.microbatches),
                    "padding_share": step.padding_share,
                    "samples_per_s": step.samples / (finished - waiting_since),
                    "tokens_per_s": step.tokens / (finished - waiting_since),
                    "data_wait_s": started - waiting_since,
                    "step_s": finished - started,
                    "memory_mib": peak_memory_mib(run.engine.device),
                }
            )
        if run.checkpoint_due(step.index + 1):
            run.save(step.index + 1)
        waiting_since = time.perf_counter()
    return loss
