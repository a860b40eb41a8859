"""Steps that went wrong: skipped ones, counted against a limit, and loss spikes; each logged with its sample keys."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from llara_dist.config import FaultsConfig
from llara_dist.console import say
from llara_dist.errors import RunFailedError
from llara_dist.stream.loader import Step
from llara_dist.training.engine import StepResult

SHOWN = 16
"""sample keys in a message; events.jsonl holds all of them"""
WINDOW, LEAST = 100, 20
"""losses that a spike is measured against: at most, and at least"""


class Faults:
    """Counts and logs what went wrong, the same on every rank; rank 0 writes OUT/events.jsonl.

    Args:
        settings: limits.
        out: the run's folder.
        skipped: steps skipped before this start, from the checkpoint.
        enabled: whether this process writes and speaks.
    """

    def __init__(self, settings: FaultsConfig, out: Path, skipped: int = 0, enabled: bool = True) -> None:
        self.skipped = skipped
        self._settings = settings
        self._path = out / "events.jsonl"
        self._enabled = enabled
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def after(self, step: Step, result: StepResult) -> None:
        """Look at a step that was done.

        A skipped step has consumed its samples and its τ; nothing was updated.

        Raises:
            RunFailedError: it was one skipped step too many, on every rank.
        """
        if not result.skipped:
            if self._is_spike(result.loss):
                mean = fmean(self._losses)
                self._tell("spike", step, step.keys.tolist(), f"loss {result.loss:.4f}, lately {mean:.4f}", result.loss)
            self._losses.append(result.loss)
            return
        self.skipped += 1
        what = "a gradient" if math.isfinite(result.loss) else "the loss"
        message = f"{what} is not finite, nothing was updated ({self.skipped} such steps so far)"
        self._tell("skipped", step, result.suspects, message, result.loss)
        if self.skipped > self._settings.max_skipped_steps:
            raise RunFailedError(
                f"step {step.index}: {message}, more than faults.max_skipped_steps={self._settings.max_skipped_steps}. "
                f"Sample keys: {_shown(result.suspects)}. Lower optimizer.lora_lr and projector_lr, or reproduce the "
                f"step: {self._command(step)}"
            )

    def _command(self, step: Step) -> str:
        return f"llara-dist debug --run {shlex.quote(str(self._path.parent))} --step {step.index} --rank all"

    def _is_spike(self, loss: float) -> bool:
        if not self._settings.spike_deviations or len(self._losses) < LEAST:
            return False
        return loss > fmean(self._losses) + self._settings.spike_deviations * stdev(self._losses)

    def _tell(self, kind: str, step: Step, keys: Sequence[int], message: str, loss: float) -> None:
        if not self._enabled:
            return
        say(f"step {step.index}: {kind}: {message}; sample keys {_shown(keys)}; reproduce it: {self._command(step)}")
        event: dict[str, Any] = {"time": time.time(), "kind": kind, "step": step.index, "loss": repr(loss)}
        with contextlib.suppress(OSError), open(self._path, "a", encoding="utf-8") as file:  # it was said all the same
            file.write(json.dumps(event | {"keys": list(keys), "message": message}) + "\n")


def _shown(keys: Sequence[int]) -> str:
    return ", ".join(map(str, keys[:SHOWN])) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
