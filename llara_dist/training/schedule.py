"""Learning rates: linear warm-up, then cosine, counted in optimizer steps of the global batch."""

from __future__ import annotations

import math

from llara_dist.config import OptimizerConfig


def learning_rate(step: int, total_steps: int, peak: float, warmup_fraction: float, floor: float) -> float:
    """The rate of optimizer step `step` (0-based); the world size plays no part, since a step's samples do not.

    Warm-up rises from `floor` × peak to the peak over the first `warmup_fraction` of the steps, cosine falls back to
    `floor` × peak at the last (LLaRA, section 4.1: 5 %, peak/100).
    """
    lowest = floor * peak
    warmup_steps = int(warmup_fraction * total_steps)
    if step < warmup_steps:
        return lowest + (peak - lowest) * step / warmup_steps
    remaining = max(1, total_steps - 1 - warmup_steps)
    done = min(1.0, (step - warmup_steps) / remaining)
    return lowest + (peak - lowest) * 0.5 * (1.0 + math.cos(math.pi * done))


def learning_rates(step: int, total_steps: int, settings: OptimizerConfig, probability: float) -> tuple[float, float]:
    """Rates of LoRA and projector at a step; the projector's is 0 while p = 0.

    In a text-only phase the projector gets zero gradients, yet momentum and decay would still move it.

    Args:
        step: optimizer step, 0-based.
        total_steps: T.
        settings: peaks, warm-up and floor.
        probability: p(step), of the curriculum.
    """
    lora, projector = (
        learning_rate(step, total_steps, peak, settings.warmup_fraction, settings.floor)
        for peak in (settings.lora_lr, settings.projector_lr)
    )
    return lora, projector if probability > 0 else 0.0
