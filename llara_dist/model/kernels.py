"""Which implementation computes each part of a step, chosen once at the start from what is installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from llara_dist.config import KernelsConfig


@dataclass(frozen=True)
class Kernels:
    """What `KernelsConfig` comes to on a device; the fields are its own, without `auto`.

    Attributes:
        reasons: by field, why `auto` did not choose a faster one.
    """

    attention: Literal["flash3", "flash2", "varlen", "sdpa"]
    projector: Literal["triton", "eager"]
    lora: Literal["fused", "peft"]
    layers: Literal["liger", "torch"]
    last_layer: Literal["answers", "all"]
    compile: bool
    reasons: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """One line for a person: "attention sdpa (no GPU), projector eager (no GPU), ..."."""
        reasons = dict(self.reasons)
        parts = [
            f"{name.replace('_', ' ')} {value}" + (f" ({reasons[name]})" if name in reasons else "")
            for name, value in vars(self).items()
            if name not in ("reasons", "compile")
        ]
        return ", ".join(parts + (["compiled"] if self.compile else []))


def choose_kernels(config: KernelsConfig, device: torch.device, dtype: torch.dtype, zero_stage: int = 0) -> Kernels:
    """The fastest of what is installed and fits the device, where the config says `auto`.

    Args:
        config: what is asked for.
        device: where it computes.
        dtype: what matrix products run in.
        zero_stage: parameters are partitioned under stage 3.

    Raises:
        InputError: what is asked for by name cannot run here.
    """
    chosen = {
        "attention": _attention(config.attention, device, dtype),
        "projector": _projector(config.projector, device),
        "lora": _lora(config.lora, device, zero_stage),
        "layers": _layers(config.layers, device),
    }
    values = {name: value for name, (value, _) in chosen.items()}
    reasons = tuple((name, reason) for name, (_, reason) in chosen.items() if reason)
    return Kernels(**values, last_layer=config.last_layer, compile=config.compile, reasons=reasons)  # pyright: ignore


def _attention(asked: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend of packed attention, and why not a faster one."""
    return "sdpa", ""


def _projector(asked: str, device: torch.device) -> tuple[str, str]:
    return "eager", ""


def _lora(asked: str, device: torch.device, zero_stage: int) -> tuple[str, str]:
    return "peft", ""


def _layers(asked: str, device: torch.device) -> tuple[str, str]:
    return "torch", ""
