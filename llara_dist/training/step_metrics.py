"""What is said of one optimizer step: the row of metrics.jsonl and TensorBoard."""

from __future__ import annotations

import math
from typing import Any

from llara_dist.stream.loader import Step
from llara_dist.training.engine import StepResult
from llara_dist.training.memory import peak_memory_mib
from llara_dist.training.run import Run


def step_row(run: Run, step: Step, result: StepResult, wait_s: float, step_s: float) -> dict[str, Any]:
    """The numbers of one step, of the whole world where they can be and else of this rank.

    Args:
        run: it is a step of.
        step: as the loader gave it.
        result: what it gave.
        wait_s: seconds that the rank waited for the step's data.
        step_s: seconds of the step itself.

    Returns:
        `loss` null where the step was skipped; `forward_s`, `backward_s` and `update_s` (reduction, clipping,
        update, gathering) of this rank add up to nearly `step_s`.
    """
    lora_lr, projector_lr = run.rates(step.index)
    phases = run.engine.phases.read()
    whole = wait_s + step_s
    return {
        "step": step.index,
        "epoch": step.epoch,
        "loss": result.loss if math.isfinite(result.loss) else None,
        "p": run.curriculum.probability(step.index),
        "hybrid_share": step.hybrid_samples / step.samples,
        "lora_lr": lora_lr,
        "projector_lr": projector_lr,
        "grad_norm": result.grad_norm,
        "skipped_steps": run.faults.skipped,
        "samples": step.samples,
        "tokens": step.tokens,
        "microbatches": len(step.microbatches),
        "padding_share": step.padding_share,
        "samples_per_s": step.samples / whole,
        "tokens_per_s": step.tokens / whole,
        "data_wait_s": wait_s,
        "step_s": step_s,
        "forward_s": phases.get("forward", 0.0),
        "backward_s": phases.get("backward", 0.0),
        "update_s": phases.get("step", 0.0),
        "memory_mib": peak_memory_mib(run.engine.device),
    }
