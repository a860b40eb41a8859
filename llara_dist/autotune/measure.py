"""Measures settings on this machine: a run's own micro-batches through its model, forward and backward."""

from __future__ import annotations

import torch

from llara_dist.autotune.agreement import Agreement
from llara_dist.autotune.memory import Memory
from llara_dist.autotune.models import Models
from llara_dist.autotune.rows import Rows
from llara_dist.autotune.settings import Setting
from llara_dist.autotune.windows import Windows
from llara_dist.config import RunConfig
from llara_dist.model.hybrid import HybridLlama
from llara_dist.model.llama import compute_dtype
from llara_dist.training.preflight.examine import Inputs


class ModelBench:
    """A run's models side by side: whether they compute the same, what memory they need, how fast they are.

    Args:
        config: the run.
        inputs: what `open_inputs` made of it.
        device: to measure on.
        ranks: that the run is for; this process stands for the first of them.
        window_s: seconds that a timed window takes at least.

    Attributes:
        longest: tokens of the longest sample.
        most_tokens: beyond which a larger budget changes nothing: a rank's share of a step, each as the longest sample.
    """

    def __init__(
        self, config: RunConfig, inputs: Inputs, device: torch.device, ranks: int, window_s: float = 0.5
    ) -> None:
        self._rows = Rows(inputs, device, ranks)
        self._models = Models(config, inputs.item_table.weight, device)
        self._memory = Memory(config, inputs, device, ranks, self._models, self._rows)
        self._agreement = Agreement(self._models, self._rows, compute_dtype(config.model, device))
        self._windows = Windows(self._models, self._rows, device, window_s)
        self.longest = inputs.shards.longest
        self.most_tokens = self._rows.most_samples * self.longest

    def is_predicted_to_fit(self, setting: Setting) -> bool:
        """Whether the cost model says that the memory which is there suffices."""
        return self._memory.is_predicted_to_fit(setting)

    def model(self, setting: Setting) -> HybridLlama:
        """The model of a setting, which `prepare` has loaded."""
        return self._models[setting]

    # -- Bench --------------------------------------------------------------------------------------------------------

    def prepare(self, setting: Setting) -> None:
        """Load the model of a setting, unless it is there.

        Raises:
            InputError: it does not load.
            DoesNotFitError: not enough memory.
        """
        self._models.load(setting)

    def release(self, setting: Setting) -> None:
        """Drop the model of a setting, and what is cached of it."""
        self._models.drop(setting)

    def difference(self, setting: Setting) -> str:
        """How loss and gradient without dropout differ from those of the first setting that was asked for."""
        return self._agreement.difference(setting)

    def fits(self, setting: Setting) -> bool:
        """Whether the largest row of the budget can be computed with what training holds beside it."""
        return self._memory.fits(setting)

    def speed(self, setting: Setting) -> float:
        """Tokens per second of one window."""
        return self._windows.speed(setting)

    def peak_bytes(self, setting: Setting) -> int | None:
        """What `fits` found: measured on a GPU with what training adds, predicted on the CPU."""
        return self._memory.peak_bytes(setting)

    def seconds_of_trial(self) -> float:
        """The longest loading so far, and 20 of the longest window: the checks, and up to seven pairs of windows."""
        return self._models.seconds_of_loading + 20 * self._windows.longest_s
