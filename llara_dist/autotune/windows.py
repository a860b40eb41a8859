"""How fast settings are: tokens per second of timed windows."""

from __future__ import annotations

import math
import time

import torch

from llara_dist.autotune.models import Models
from llara_dist.autotune.rows import Rows, backward
from llara_dist.autotune.settings import Setting
from llara_dist.model.hybrid import HybridLlama
from llara_dist.stream.batch import Batch


class Windows:
    """Windows of a step's rows, over and over, forward and backward.

    Args:
        models: what is loaded.
        rows: what goes through it.
        device: that computes.
        seconds: that a window takes at least.

    Attributes:
        longest_s: seconds of the longest window so far.
    """

    def __init__(self, models: Models, rows: Rows, device: torch.device, seconds: float) -> None:
        self.longest_s = 0.0
        self._models, self._rows, self._device, self._seconds = models, rows, device, seconds
        self._counts: dict[Setting, int] = {}

    def speed(self, setting: Setting) -> float:
        """Tokens per second of one window, of as many rows as take a window's time.

        Raises:
            DoesNotFitError: memory ran out.
        """
        rows, model, attempt = self._rows.of_step(setting.tokens), self._models[setting], self._models.attempt
        if setting not in self._counts:
            first = rows[:1]
            attempt(lambda: self._time(model, first))  # compiles, looks for the fastest kernels: its time says nothing
            count = max(1, math.ceil(self._seconds / attempt(lambda: self._time(model, first))))
            # A row of another length or number of items may take another variant of a kernel, which compiles once more.
            attempt(lambda: self._time(model, rows[1:count]))
            self._counts[setting] = count
        chosen = [rows[place % len(rows)] for place in range(self._counts[setting])]
        seconds = attempt(lambda: self._time(model, chosen))
        self.longest_s = max(self.longest_s, seconds)
        return sum(row.num_tokens for row in chosen) / seconds

    def _time(self, model: HybridLlama, rows: list[Batch]) -> float:
        """Seconds of rows, one after the other."""
        self._synchronise()
        started = time.perf_counter()
        for row in rows:
            backward(model, row)
        self._synchronise()
        seconds = time.perf_counter() - started
        model.zero_grad(set_to_none=True)
        return seconds

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
