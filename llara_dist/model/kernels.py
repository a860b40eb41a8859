"""Which implementation computes each part of a step, chosen once at the start from what is installed."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch

from llara_dist import distributed
from llara_dist.config import KernelsConfig, ModelConfig
from llara_dist.console import say
from llara_dist.errors import Finding, FindingsError
from llara_dist.model.attention import NAME as PACKED
from llara_dist.model.attention_backends import FASTEST_FIRST, obstacle
from llara_dist.model.llama import compute_dtype, read_llama_config

CHECK, CHECK_HERE = "kernels", "kernels here"
"""names of findings: what the run's own settings rule out, and what this machine cannot run"""


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

    def values(self) -> dict[str, Any]:
        """What was chosen, by field of `KernelsConfig`."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(KernelsConfig)}

    def __str__(self) -> str:
        """One line for a person: "attention sdpa (no GPU), projector eager (no GPU), ..."."""
        reasons = dict(self.reasons)
        parts = [
            f"{name.replace('_', ' ')} {value}" + (f" ({reasons[name]})" if name in reasons else "")
            for name, value in self.values().items()
            if name != "compile"
        ]
        return ", ".join(parts + (["compiled"] if self.compile else []))


Choose = Callable[[KernelsConfig], Kernels]
"""what `choose_kernels` makes of a config for a model and a device"""


def chooser(model: ModelConfig, device: torch.device, zero_stage: int = 0) -> Choose:
    """`choose_kernels` for a model on a device.

    Args:
        model: the run's.
        device: where it computes.
        zero_stage: as in `choose_kernels`.

    Raises:
        InputError: the model's config.json is not found, or is none of a Llama.
    """
    llama = read_llama_config(model)
    return partial(
        choose_kernels,
        device=device,
        dtype=compute_dtype(model, device),
        zero_stage=zero_stage,
        head_dim=llama.head_dim or llama.hidden_size // llama.num_attention_heads,
        model_attention=model.attention,
    )


def runnable(config: KernelsConfig, choose: Choose) -> KernelsConfig:
    """The same with `auto` for every name that cannot run here, and nothing compiled; rank 0 says what was replaced.

    A run is evaluated and debugged on other machines than it was tuned on, where speed matters less.

    Args:
        config: the run's.
        choose: for its model on this machine's device.
    """
    config = dataclasses.replace(config, compile=False)
    for name in ("attention", "projector", "lora", "layers"):
        asked = getattr(config, name)
        alone = KernelsConfig(**{name: asked})
        try:
            choose(alone)
        except FindingsError as error:
            config = dataclasses.replace(config, **{name: "auto"})
            if distributed.read_world().is_main:
                instead = getattr(choose(KernelsConfig()), name)
                say(f"{error.errors[0].found}; {instead} computes instead")
    return config


def settle_memory(config: KernelsConfig, device: torch.device, zero_stage: int) -> KernelsConfig:
    """The same with what `auto` comes to on a device, for adapters and layers: they decide what a step needs.

    Args:
        config: the run's.
        device: where it computes.
        zero_stage: as in `choose_kernels`.
    """
    chosen = {"lora": _lora("auto", device, zero_stage)[0], "layers": _layers("auto", device)[0]}
    left = {name: value for name, value in chosen.items() if getattr(config, name) == "auto"}
    return dataclasses.replace(config, **left)


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
        FindingsError: what is asked for by name cannot run here; every field of which that is true.
    """
    refused: list[Finding] = []
    values: dict[str, Any] = {}
    reasons: list[tuple[str, str]] = []
    for name, choose in {
        "attention": lambda asked: _attention(asked, device, dtype, head_dim, model_attention),
        "projector": lambda asked: _projector(asked, device, dtype, zero_stage),
        "lora": lambda asked: _lora(asked, device, zero_stage),
        "layers": lambda asked: _layers(asked, device),
        "last_layer": lambda asked: _last_layer(asked, model_attention),
        "compile": lambda asked: _compile(asked, device, zero_stage),
    }.items():
        asked = getattr(config, name)
        try:
            values[name], reason = choose(asked)
        except _RefusedError as error:
            shown, instead = ("true", "false") if asked is True else (asked, "auto")
            remedy = f"{error.remedy}, or use {instead}" if error.remedy else f"use {instead}"
            refused.append(Finding(error.check, f"kernels.{name}={shown}: {error}", remedy))
            continue
        reasons += [(name, reason)] if reason else []
    if refused:
        raise FindingsError(refused, "kernels")
    return Kernels(**values, reasons=tuple(reasons))


class _RefusedError(ValueError):
    """Why what is asked for by name cannot run.

    Args:
        reason: in a few words.
        check: name of the finding.
        remedy: what to do to have it run, where that is more than to install what the reason names.
    """

    def __init__(self, reason: str, check: str = CHECK_HERE, remedy: str = "") -> None:
        super().__init__(reason)
        self.check, self.remedy = check, remedy


def _attention(
    asked: str, device: torch.device, dtype: torch.dtype, head_dim: int, model_attention: str
) -> tuple[str, str]:
    """The backend of packed attention, and why not a faster one."""
    if model_attention != PACKED:
        if asked not in ("auto", "sdpa"):
            raise _RefusedError(f"model.attention={model_attention} does not pack rows", CHECK)
        return "sdpa", f"model.attention={model_attention}"
    if asked != "auto":
        if reason := obstacle(asked, device, dtype, head_dim):  # pyright: ignore[reportArgumentType]
            raise _RefusedError(reason)
        return asked, ""
    reasons: dict[str, str] = {}
    for backend in FASTEST_FIRST:
        reason = obstacle(backend, device, dtype, head_dim)
        if not reason:
            return backend, ", ".join(f"{name}: {why}" for name, why in reasons.items())
        reasons[backend] = reason
    same = set(reasons.values())
    return "sdpa", same.pop() if len(same) == 1 else ", ".join(f"{name}: {why}" for name, why in reasons.items())


def _projector(asked: str, device: torch.device, dtype: torch.dtype, zero_stage: int) -> tuple[str, str]:
    """The projector's implementation, and why not the fused op."""
    if asked == "eager":
        return "eager", ""
    reason = ""
    if zero_stage == 3:
        # The fused op takes whole weights; DeepSpeed gathers them when their module is called.
        reason = "ZeRO-3 partitions the projector's weights"
    elif device.type != "cuda":
        reason = "no GPU"
    elif lacks := _triton_lacks():
        reason = lacks
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reason = "the GPU is older than compute capability 8.0"
    elif dtype not in (torch.bfloat16, torch.float32):
        reason = f"it does not compute in {str(dtype).removeprefix('torch.')}"
    if asked == "triton" and reason:
        raise _RefusedError(reason, CHECK if zero_stage == 3 else CHECK_HERE)
    return ("eager", reason) if reason else ("triton", "")


def _lora(asked: str, device: torch.device, zero_stage: int) -> tuple[str, str]:
    """Who computes the adapters, and why not the fused op."""
    reason = ""
    if zero_stage == 3:
        reason = "ZeRO-3 gathers adapters in PEFT's calls"
    elif device.type == "cuda":
        reason = _triton_lacks()
    if asked == "fused" and reason:
        raise _RefusedError(reason, CHECK if zero_stage == 3 else CHECK_HERE)
    return ("peft", reason if asked == "auto" else "") if reason or asked == "peft" else ("fused", "")


def _layers(asked: str, device: torch.device) -> tuple[str, str]:
    """Who computes norms, rotary embedding and SwiGLU, and why not Liger."""
    if asked == "torch":
        return "torch", ""
    if device.type != "cuda":
        lacks = "no GPU"
    elif find_spec("liger_kernel") is None:
        lacks = "liger_kernel is not installed"
    else:
        lacks = _liger_lacks()
    if lacks and asked == "liger":
        raise _RefusedError(lacks)
    return ("torch", lacks) if lacks else ("liger", "")


def _last_layer(asked: str, model_attention: str) -> tuple[str, str]:
    """Which rows of the last layer are computed, and why not fewer."""
    if asked == "answers" and model_attention != PACKED:
        return "all", f"model.attention={model_attention}"
    return asked, ""


def _compile(asked: bool, device: torch.device, zero_stage: int) -> tuple[bool, str]:
    """Whether the decoder layers are compiled."""
    if asked and zero_stage == 3:
        raise _RefusedError("ZeRO-3 gathers parameters in hooks that a compiled layer skips", CHECK)
    # On a GPU as well: fused adapters draw their seeds on the host, which a compiled layer does in C++.
    if asked and _has_no_cpp_compiler():
        raise _RefusedError("torch.compile finds no C++ compiler", remedy="install g++, name another in CXX")
    if asked and device.type == "cuda" and (lacks := _triton_lacks()):
        raise _RefusedError(lacks)
    return asked, ""


def _has_no_cpp_compiler() -> bool:
    """Whether torch.compile would fail at the first pass, by its own search: CXX, else g++."""
    # Not needed where nothing is compiled, and slow to import.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):  # OSError: what CXX names cannot be started
        return True
    return False


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
