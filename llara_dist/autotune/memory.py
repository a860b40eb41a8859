"""What settings need of the device's memory in a training run, and whether it is there.

What the optimizer and ZeRO will hold beside the model is not allocated but counted (`cost/memory.py`).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from llara_dist.autotune.bench import DoesNotFitError
from llara_dist.autotune.models import Models
from llara_dist.autotune.rows import Rows, backward
from llara_dist.autotune.settings import RECOMPUTE, Setting
from llara_dist.config import RunConfig
from llara_dist.cost.architecture import Architecture
from llara_dist.cost.memory import estimate_run_memory, trained_bytes
from llara_dist.cost.recommend import MARGIN
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import SampleSizes
from llara_dist.cost.zero import ZeroSettings
from llara_dist.model.llama import compute_dtype, read_llama_config
from llara_dist.training.preflight.examine import Inputs
from llara_dist.training.preflight.resources import free_device_bytes, free_host_bytes


class Memory:
    """Memory of one rank; made before any model is loaded, since it asks what is free.

    Args:
        config: the run.
        inputs: what `open_inputs` made of it.
        device: whose memory.
        ranks: that the run is for.
        models: what is loaded.
        rows: what goes through it.
    """

    def __init__(
        self, config: RunConfig, inputs: Inputs, device: torch.device, ranks: int, models: Models, rows: Rows
    ) -> None:
        self._config, self._inputs, self._device, self._ranks = config, inputs, device, ranks
        self._models, self._rows = models, rows
        self._bfloat16 = compute_dtype(config.model, device) == torch.bfloat16
        self._llama = read_llama_config(config.model)
        self._sizes = SampleSizes.of(inputs.shards.info, inputs.shards.longest)
        self._peaks: dict[Setting, int] = {}
        self._alone: dict[Setting, bool] = {}
        free = free_device_bytes(device)
        resident = 0 if free is not None else _resident_bytes()
        # On the CPU the ranks share the node's memory.
        total = free if free is not None else (free_host_bytes() + resident) // ranks
        self._room = int((1 - MARGIN) * total)

    def predicted_bytes(self, setting: Setting) -> int:
        """What the cost model says that a rank needs: of its device, on the CPU of the host."""
        config = dataclasses.replace(
            self._config,
            model=dataclasses.replace(self._config.model, **{RECOMPUTE: setting.recompute}),
            data=dataclasses.replace(self._config.data, max_tokens_per_microbatch=setting.tokens),
            kernels=setting.kernels,
        )
        items, width = self._inputs.item_table.weight.shape
        memory = estimate_run_memory(
            config,
            self._llama,
            self._inputs.ds_config,
            self._ranks,
            (items, width),
            self._sizes,
            self._device.type,
            self._bfloat16,
        )
        return memory.device_bytes + (memory.host_bytes if self._device.type == "cpu" else 0)

    def is_predicted_to_fit(self, setting: Setting) -> bool:
        """Whether the cost model says that the memory which is there suffices."""
        return self.predicted_bytes(setting) <= self._room

    def fits(self, setting: Setting) -> bool:
        """Whether the largest row of the budget can be computed with what training holds beside it.

        On a GPU by doing it; on the CPU, where a process that takes too much is killed, by the cost model.
        """
        if self._device.type == "cpu":
            self._peaks[setting] = self.predicted_bytes(setting)
            return self.is_predicted_to_fit(setting)
        others = self._models.bytes_beside(setting)
        if not others and setting in self._alone:
            return self._alone[setting]
        try:
            needed = self._models.attempt(lambda: self._peak_of_row(setting)) + self._held_in_training()
        except DoesNotFitError:
            is_held = False
        else:
            self._peaks[setting] = needed - sum(others)
            is_held = needed <= self._room
        if not others:
            self._alone[setting] = is_held
        return is_held

    def peak_bytes(self, setting: Setting) -> int | None:
        """What `fits` found: measured on a GPU with what training adds, predicted on the CPU."""
        return self._peaks.get(setting)

    def _peak_of_row(self, setting: Setting) -> int:
        """Allocated bytes at the peak of two rows, the second with the gradients of the first."""
        model, row = self._models[setting], self._rows.largest(setting.tokens)
        self._models.free()
        torch.cuda.reset_peak_memory_stats(self._device)
        for _ in range(2):
            backward(model, row)
        torch.cuda.synchronize(self._device)
        model.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated(self._device)

    def _held_in_training(self) -> int:
        """Bytes that a rank holds on its device beside parameters, gradients and activations."""
        items, width = self._inputs.item_table.weight.shape
        tuned = TunedModel.of(self._config, Architecture.of(self._llama), (items, width), self._bfloat16)
        zero = ZeroSettings.of(self._inputs.ds_config, str(self._config.deepspeed))
        held = sum(trained_bytes(tuned, zero, self._ranks)[0].values())
        return max(0, held - 2 * 4 * tuned.trainable)


def _resident_bytes() -> int:
    """What this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
