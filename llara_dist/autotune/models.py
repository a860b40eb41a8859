"""Models of a run, one for each variant of its settings, loaded side by side; they outlive memory that runs out.

Adapters start at zero, where their part of a result is zero whatever computes it: they are given values first.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from llara_dist.autotune.bench import DoesNotFitError
from llara_dist.autotune.settings import RECOMPUTE, Setting
from llara_dist.config import RunConfig
from llara_dist.hashing import hash64, text_seed
from llara_dist.model import attention_order
from llara_dist.model.hybrid import HybridLlama, build_hybrid_llama

ADAPTER_STD = 0.02
"""of the values that zero adapters are given"""

T = TypeVar("T")


class Models:
    """What is loaded.

    Args:
        config: the run.
        items: behaviour embeddings before projection.
        device: to load on.

    Attributes:
        seconds_of_loading: that the longest took so far.
    """

    def __init__(self, config: RunConfig, items: Tensor, device: torch.device) -> None:
        self.seconds_of_loading = 0.0
        self._config, self._items, self._device = config, items, device
        self._loaded: dict[Setting, HybridLlama] = {}
        self._bytes: dict[Setting, int] = {}

    def load(self, setting: Setting) -> None:
        """Load the model of a setting, unless it is there.

        Raises:
            InputError: it does not load.
            DoesNotFitError: not enough memory.
        """
        if setting.variant in self._loaded:
            return
        started = time.monotonic()
        before = self._allocated()
        self._loaded[setting.variant] = self.attempt(lambda: self._build(setting))
        self._bytes[setting.variant] = self._allocated() - before
        self.seconds_of_loading = max(self.seconds_of_loading, time.monotonic() - started)

    def drop(self, setting: Setting) -> None:
        """Drop the model of a setting, and what is cached of it."""
        if self._loaded.pop(setting.variant, None) is not None:
            if setting.kernels.compile:
                torch.compiler.reset()
            self.free()

    def __getitem__(self, setting: Setting) -> HybridLlama:
        """The model of a setting, which `load` has loaded."""
        return self._loaded[setting.variant]

    def bytes_beside(self, setting: Setting) -> list[int]:
        """Device memory of each model that is loaded beside the one of a setting."""
        return [self._bytes[variant] for variant in self._loaded if variant != setting.variant]

    def attempt(self, measured: Callable[[], T]) -> T:
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
        for model in self._loaded.values():
            model.zero_grad(set_to_none=True)
        self.free()
        raise DoesNotFitError

    def free(self) -> None:
        """Give back memory that nothing holds any more."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _build(self, setting: Setting) -> HybridLlama:
        config = self._config
        model = build_hybrid_llama(
            dataclasses.replace(config.model, **{RECOMPUTE: setting.recompute}),
            config.lora,
            config.projector,
            self._items,
            self._device,
            config.seed,
            kernels=setting.kernels,
        ).train()
        fill_zero_parameters(model)
        return model

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0


def fill_zero_parameters(model: HybridLlama) -> None:
    """Give adapters that are zero the same small values in every model of a run."""
    for name, parameter in model.lora_parameters().items():
        if not parameter.detach().any():
            generator = torch.Generator().manual_seed(int(hash64(text_seed(name))) >> 1)
            values = torch.randn(parameter.shape, generator=generator) * ADAPTER_STD
            parameter.data.copy_(values)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out: PyTorch's own, cuBLAS' and the CPU allocator's."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in said for sign in ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    )
