"""Which implementation computes each part of a step, chosen once at the start from what is installed."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from llara_dist.config import KernelsConfig
from llara_dist.errors import InputError
from llara_dist.model.attention import NAME as PACKED
from llara_dist.model.attention_backends import FASTEST_FIRST, obstacle


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


def choose_kernels(
    config: KernelsConfig,
    device: torch.device,
    dtype: torch.dtype,
    zero_stage: int = 0,
    head_dim: int = 128,
    model_attention: str = PACKED,
) -> Kernels:
    """The fastest of what is installed and fits the device, where the config says `auto`.

    Args:
        config: what is asked for.
        device: where it computes.
        dtype: what matrix products run in.
        zero_stage: parameters are partitioned under stage 3.
        head_dim: width of an attention head.
        model_attention: `model.attention`; what is made for packed rows needs `packed`.

    Raises:
        InputError: what is asked for by name cannot run here.
    """
    if config.compile and zero_stage == 3:
        raise InputError(
            "kernels.compile=true: ZeRO-3 gathers parameters in hooks that a compiled layer skips; use stage 0 to 2"
        )
    chosen = {
        "attention": _attention(config.attention, device, dtype, head_dim, model_attention),
        "projector": _projector(config.projector, device, dtype, zero_stage),
        "lora": _lora(config.lora, device, zero_stage),
        "layers": _layers(config.layers, device),
        "last_layer": _last_layer(config.last_layer, model_attention),
    }
    values = {name: value for name, (value, _) in chosen.items()}
    reasons = tuple((name, reason) for name, (_, reason) in chosen.items() if reason)
    return Kernels(**values, compile=config.compile, reasons=reasons)  # pyright: ignore


def _attention(
    asked: str, device: torch.device, dtype: torch.dtype, head_dim: int, model_attention: str
) -> tuple[str, str]:
    """The backend of packed attention, and why not a faster one."""
    if model_attention != PACKED:
        return "sdpa", f"model.attention={model_attention}"
    if asked != "auto":
        if reason := obstacle(asked, device, dtype, head_dim):  # pyright: ignore[reportArgumentType]
            raise InputError(f"kernels.attention={asked}: {reason}; use auto")
        return asked, ""
    reasons: dict[str, str] = {}
    for backend in FASTEST_FIRST:
        reason = obstacle(backend, device, dtype, head_dim)
        if not reason:
            return backend, ", ".join(f"{name}: {why}" for name, why in reasons.items())
        reasons[backend] = reason
    same = set(reasons.values())
    return "sdpa", same.pop() if len(same) == 1 else ", ".join(f"{name}: {why}" for name, why in reasons.items())


def _last_layer(asked: str, model_attention: str) -> tuple[str, str]:
    """Which rows of the last layer are computed, and why not fewer."""
    if asked == "answers" and model_attention != PACKED:
        return "all", f"model.attention={model_attention}"
    return asked, ""


def _projector(asked: str, device: torch.device, dtype: torch.dtype, zero_stage: int) -> tuple[str, str]:
    """The projector's implementation, and why not the fused op."""
    if asked == "eager":
        return "eager", ""
    reason = ""
    if device.type != "cuda":
        reason = "no GPU"
    elif lacks := _triton_lacks():
        reason = lacks
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reason = "the GPU is older than compute capability 8.0"
    elif dtype not in (torch.bfloat16, torch.float32):
        reason = f"it does not compute in {str(dtype).removeprefix('torch.')}"
    elif zero_stage == 3:
        # The fused op takes whole weights; DeepSpeed gathers them when their module is called.
        reason = "ZeRO-3 partitions the projector's weights"
    if asked == "triton" and reason:
        raise InputError(f"kernels.projector=triton cannot run: {reason}; set kernels.projector to auto or eager")
    return ("eager", reason) if reason else ("triton", "")


def _lora(asked: str, device: torch.device, zero_stage: int) -> tuple[str, str]:
    """Who computes the adapters, and why not the fused op."""
    reason = ""
    if zero_stage == 3:
        reason = "ZeRO stage 3 gathers adapters in PEFT's calls"
    elif device.type == "cuda":
        reason = _triton_lacks()
    if asked == "fused" and reason:
        raise InputError(f"kernels.lora=fused cannot run: {reason}; use peft or auto")
    return ("peft", reason if asked == "auto" else "") if reason or asked == "peft" else ("fused", "")


def _triton_lacks() -> str:
    """What Triton wants here and does not find; empty where it can compile."""
    if find_spec("triton") is None:
        return "triton is not installed"
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    return "" if any(shutil.which(name) for name in compilers) else "triton finds no C compiler"


def _liger_lacks() -> str:
    """What of Liger this package calls does not load; empty where all does."""
    try:
        from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction  # noqa: F401
    except ImportError as error:
        return f"liger_kernel does not load, version 0.7 or newer is needed ({str(error).splitlines()[0]})"
    return ""


def _layers(asked: str, device: torch.device) -> tuple[str, str]:
    """Who computes norms, rotary embedding and SwiGLU, and why not Liger."""
    if asked == "torch":
        return "torch", ""
    lacks = "" if find_spec("liger_kernel") is not None else "liger_kernel is not installed"
    lacks = lacks or ("" if device.type == "cuda" else "no GPU") or _liger_lacks()
    if lacks and asked == "liger":
        raise InputError(f"kernels.layers=liger: {lacks}; use kernels.layers=auto")
    return ("torch", lacks) if lacks else ("liger", "")
