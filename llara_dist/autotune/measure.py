"""Measures settings on this machine: a run's own micro-batches through its model, forward and backward.

Rows are packed as training packs them, every sample hybrid, which is its longer form. Adapters start at zero, where
their part of a result is zero whatever computes it: they are given values first. What the optimizer and ZeRO will hold
beside the model is not allocated but counted (`cost/memory.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llara_dist.autotune.bench import DoesNotFitError
from llara_dist.autotune.settings import RECOMPUTE, Setting
from llara_dist.config import RunConfig
from llara_dist.cost.architecture import Architecture
from llara_dist.cost.memory import estimate_run_memory, trained_bytes
from llara_dist.cost.recommend import MARGIN
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import SampleSizes
from llara_dist.cost.zero import ZeroSettings
from llara_dist.hashing import hash64, text_seed
from llara_dist.model import attention_order
from llara_dist.model.hybrid import HybridLlama, build_hybrid_llama
from llara_dist.model.llama import compute_dtype, read_llama_config
from llara_dist.stream.batch import Batch, collate
from llara_dist.stream.loader import StepMaker
from llara_dist.training.preflight.examine import Inputs
from llara_dist.training.preflight.resources import free_device_bytes, free_host_bytes

TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 2e-1)}
"""by compute type: largest relative difference of the loss, and of the gradient in its norm. A gradient passes some 20
roundings a layer, of 2^-24 or 2^-9 each, which add up as a random walk: over 80 layers to 2e-6 or 8e-2 on either side.
Float32 is given more, since sums of thousands of terms are taken in other orders; bfloat16 sums in float32. The loss is
a mean over many tokens. What this cannot tell from rounding in bfloat16 the kernels' own tests have to."""
ADAPTER_STD = 0.02
"""of the values that zero adapters are given"""
LOOKED_AT = 4096
"""samples of the plan's beginning among which the longest is looked for"""


class ModelBench:
    """Models of a run, loaded side by side, and what they take.

    Args:
        config: the run.
        inputs: what `open_inputs` made of it.
        device: to measure on.
        ranks: that the run is for; this process stands for the first of them.
        window_s: seconds that a timed window takes at least.
    """

    def __init__(
        self, config: RunConfig, inputs: Inputs, device: torch.device, ranks: int, window_s: float = 0.5
    ) -> None:
        self._config, self._inputs, self._device, self._ranks = config, inputs, device, ranks
        self._dtype = compute_dtype(config.model, device)
        self._llama = read_llama_config(config.model)
        self._sizes = SampleSizes.of(inputs.shards.info, inputs.shards.longest)
        self._models: dict[Setting, HybridLlama] = {}
        self._model_bytes: dict[Setting, int] = {}
        self._rows: dict[int, list[Batch]] = {}
        self._peaks: dict[Setting, int] = {}
        self._alone: dict[Setting, bool] = {}
        self._window_rows: dict[Setting, int] = {}
        self._reference: tuple[float, dict[str, Tensor]] | None = None
        self._window_s = window_s
        self._load_s = 0.0
        self._trial_s = 0.0
        free = free_device_bytes(device)
        resident = 0 if free is not None else _resident_bytes()
        # On the CPU the ranks share the node's memory.
        total = free if free is not None else (free_host_bytes() + resident) // ranks
        self._room = int((1 - MARGIN) * total)

    # -- what is there ------------------------------------------------------------------------------------------------

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return self._sizes.longest

    @property
    def most_tokens(self) -> int:
        """Tokens beyond which a larger budget changes nothing: a rank's share of a step, each as the longest sample."""
        return math.ceil(self._config.data.global_batch_samples / self._ranks) * self._sizes.longest

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
            self._dtype == torch.bfloat16,
        )
        return memory.device_bytes + (memory.host_bytes if self._device.type == "cpu" else 0)

    def is_predicted_to_fit(self, setting: Setting) -> bool:
        """Whether the cost model says that the memory which is there suffices."""
        return self.predicted_bytes(setting) <= self._room

    def model(self, setting: Setting) -> HybridLlama:
        """The model of a setting, which `prepare` has loaded."""
        return self._models[setting.variant]

    # -- Bench --------------------------------------------------------------------------------------------------------

    def prepare(self, setting: Setting) -> None:
        """Load the model of a setting, unless it is there.

        Raises:
            InputError: it does not load.
            DoesNotFitError: not enough memory.
        """
        if setting.variant in self._models:
            return
        started = time.monotonic()
        before = self._allocated()
        self._models[setting.variant] = self._attempt(lambda: self._load(setting))
        self._model_bytes[setting.variant] = self._allocated() - before
        self._load_s = max(self._load_s, time.monotonic() - started)

    def release(self, setting: Setting) -> None:
        """Drop the model of a setting, and what is cached of it."""
        if self._models.pop(setting.variant, None) is not None:
            if setting.kernels.compile:
                torch.compiler.reset()
            self._free()

    def difference(self, setting: Setting) -> str:
        """How loss and gradient without dropout differ from those of the first setting that was asked for."""
        loss, gradients = self._attempt(lambda: self._loss_and_gradients(self.model(setting)))
        if self._reference is None:
            self._reference = loss, gradients
        return describe_difference(self._reference, (loss, gradients), self._dtype)

    def fits(self, setting: Setting) -> bool:
        """Whether the largest row of the budget can be computed with what training holds beside it.

        On a GPU by doing it; on the CPU, where a process that takes too much is killed, by the cost model.
        """
        if self._device.type == "cpu":
            self._peaks[setting] = self.predicted_bytes(setting)
            return self.is_predicted_to_fit(setting)
        others = [self._model_bytes[variant] for variant in self._models if variant != setting.variant]
        if not others and setting in self._alone:
            return self._alone[setting]
        try:
            needed = self._attempt(lambda: self._peak_of_row(setting)) + self._held_in_training()
        except DoesNotFitError:
            is_held = False
        else:
            self._peaks[setting] = needed - sum(others)
            is_held = needed <= self._room
        if not others:
            self._alone[setting] = is_held
        return is_held

    def speed(self, setting: Setting) -> float:
        """Tokens per second of one window: the rows of a step, over and over, as many as take a window's time."""
        rows, model = self._step_rows(setting.tokens), self.model(setting)

        def window(chosen: list[Batch]) -> tuple[int, float]:
            self._synchronise()
            started = time.perf_counter()
            for row in chosen:
                _backward(model, row)
            self._synchronise()
            seconds = time.perf_counter() - started
            model.zero_grad(set_to_none=True)
            return sum(row.num_tokens for row in chosen), seconds

        if setting not in self._window_rows:
            first = rows[:1]
            self._attempt(lambda: window(first))  # compiles, and looks for the fastest kernels: its time says nothing
            count = max(1, math.ceil(self._window_s / self._attempt(lambda: window(first))[1]))
            # A row of another length or number of items may take another variant of a kernel, which compiles once more.
            self._attempt(lambda: window(rows[1:count]))
            self._window_rows[setting] = count
        chosen = [rows[place % len(rows)] for place in range(self._window_rows[setting])]
        tokens, seconds = self._attempt(lambda: window(chosen))
        self._trial_s = max(self._trial_s, seconds)
        return tokens / seconds

    def peak_bytes(self, setting: Setting) -> int | None:
        """What `fits` found: measured on a GPU with what training adds, predicted on the CPU."""
        return self._peaks.get(setting)

    def seconds_of_trial(self) -> float:
        """The longest loading so far, and 20 of the longest window: the checks, and up to seven pairs of windows."""
        return self._load_s + 20 * self._trial_s

    # -- how ----------------------------------------------------------------------------------------------------------

    def _load(self, setting: Setting) -> HybridLlama:
        config = self._config
        model = build_hybrid_llama(
            dataclasses.replace(config.model, **{RECOMPUTE: setting.recompute}),
            config.lora,
            config.projector,
            self._inputs.item_table.weight,
            self._device,
            config.seed,
            kernels=setting.kernels,
        ).train()
        fill_zero_parameters(model)
        return model

    def _attempt(self, measured: Callable[[], Any]) -> Any:
        """Call, and clean up where memory ran out.

        Raises:
            DoesNotFitError: memory ran out.
        """
        try:
            return measured()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        attention_order.restore()
        # Only here, where the error and the frames that it holds are gone, can their tensors be freed.
        for model in self._models.values():
            model.zero_grad(set_to_none=True)
        self._free()
        raise DoesNotFitError

    def _free(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _peak_of_row(self, setting: Setting) -> int:
        """Allocated bytes at the peak of two rows, the second with the gradients of the first."""
        model, row = self.model(setting), self._largest_row(setting.tokens)
        self._free()
        torch.cuda.reset_peak_memory_stats(self._device)
        for _ in range(2):
            _backward(model, row)
        self._synchronise()
        model.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated(self._device)

    def _held_in_training(self) -> int:
        """Bytes that a rank holds on its device beside parameters, gradients and activations."""
        items, width = self._inputs.item_table.weight.shape
        bfloat16 = self._dtype == torch.bfloat16
        tuned = TunedModel.of(self._config, Architecture.of(self._llama), (items, width), bfloat16)
        zero = ZeroSettings.of(self._inputs.ds_config, str(self._config.deepspeed))
        held = sum(trained_bytes(tuned, zero, self._ranks)[0].values())
        return max(0, held - 2 * 4 * tuned.trainable)

    def _maker(self, tokens: int) -> StepMaker:
        return StepMaker(self._inputs.shards, self._inputs.plan, _all_hybrid, 0, (self._ranks,), tokens)

    def _step_rows(self, tokens: int) -> list[Batch]:
        """What the first rank computes in the run's first step, on the device."""
        if tokens not in self._rows:
            rows = self._maker(tokens).make(0).microbatches
            self._rows[tokens] = [row.to(self._device, non_blocking=False) for row in rows if not row.is_empty]
        return self._rows[tokens]

    def _largest_row(self, tokens: int) -> Batch:
        """The longest samples of the plan's beginning that the budget holds, on the device."""
        plan, shards = self._inputs.plan, self._inputs.shards
        steps = range(min(plan.num_steps, math.ceil(LOOKED_AT / plan.global_batch)))
        ids = np.concatenate([plan.step(step) for step in steps])
        lengths = shards.lookup(ids).tokens.astype(np.int64)
        order = np.argsort(-lengths, kind="stable")
        most = math.ceil(self._config.data.global_batch_samples / self._ranks)
        fitting = max(1, int(np.searchsorted(np.cumsum(lengths[order]), tokens, side="right")))
        chosen = ids[order[: min(fitting, most)]]
        return collate(shards.read(chosen), [True] * len(chosen)).to(self._device, non_blocking=False)

    def _loss_and_gradients(self, model: HybridLlama) -> tuple[float, dict[str, Tensor]]:
        """Of a short row, half of it text-only, without dropout; the gradients on the host."""
        plan, shards = self._inputs.plan, self._inputs.shards
        ids = plan.step(0)[:4]
        row = collate(shards.read(ids), np.arange(len(ids)) % 2 == 0).to(self._device, non_blocking=False)
        with without_dropout(model):
            loss = _backward(model, row)
        trained = {**model.lora_parameters(), **model.projector_parameters()}
        gradients = {name: p.grad.detach().float().cpu() for name, p in trained.items() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return float(loss), gradients


def _all_hybrid(step: int, keys: np.ndarray, passes: np.ndarray) -> np.ndarray:
    return np.ones(len(keys), dtype=bool)


def _backward(model: HybridLlama, row: Batch) -> Tensor:
    """Mean answer loss of a row, detached; gradients are added to those there are."""
    loss = model(row) / row.answer_tokens
    loss.backward()
    return loss.detach()


def fill_zero_parameters(model: HybridLlama) -> None:
    """Give adapters that are zero the same small values in every model of a run."""
    for name, parameter in model.lora_parameters().items():
        if not parameter.detach().any():
            generator = torch.Generator().manual_seed(int(hash64(text_seed(name))) >> 1)
            values = torch.randn(parameter.shape, generator=generator) * ADAPTER_STD
            parameter.data.copy_(values)


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Training mode, so that what runs is what training runs, but nothing dropped."""
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    before = [module.p for module in dropouts]
    try:
        for module in dropouts:
            module.p = 0.0
        yield
    finally:
        for module, probability in zip(dropouts, before, strict=True):
            module.p = probability


def describe_difference(
    expected: tuple[float, dict[str, Tensor]], found: tuple[float, dict[str, Tensor]], dtype: torch.dtype
) -> str:
    """How a loss and its gradients differ beyond rounding; "" where they agree.

    Args:
        expected: loss, and gradients by parameter.
        found: the same of another implementation.
        dtype: what matrix products run in.
    """
    loss_tolerance, gradient_tolerance = TOLERANCE[dtype]
    if not abs(found[0] - expected[0]) <= loss_tolerance * abs(expected[0]):
        return f"the loss is {found[0]:.6g}, the start's {expected[0]:.6g}"
    if expected[1].keys() != found[1].keys():
        return "other parameters have gradients than at the start"
    off = math.sqrt(sum(float((found[1][name] - value).square().sum()) for name, value in expected[1].items()))
    norm = math.sqrt(sum(float(value.square().sum()) for value in expected[1].values()))
    if not off <= gradient_tolerance * norm:
        return f"the gradient differs from the start's by {off / norm:.1%}"
    return ""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out: PyTorch's own, cuBLAS' and the CPU allocator's."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in said for sign in ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    )


def _resident_bytes() -> int:
    """What this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
