"""What computes attention over a packed row, none of it with padding, and what each asks of the device.

All of them are causal from the lower right corner: the last query of a sample stands at its last key. The backward
passes add in a fixed order (`attention_order.py`): the same step again, after a resumption, gives the same bits.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from llara_dist.model.attention_order import fixed_order
from llara_dist.model.packing import Backend, Packing

FASTEST_FIRST: tuple[Backend, ...] = ("flash3", "flash2", "varlen")
"""what `auto` tries before `sdpa`"""

_MODULES = {"flash3": "flash_attn_interface", "flash2": "flash_attn", "varlen": "torch.nn.attention.varlen"}
_NEEDED = {
    "flash3": ("flash_attn_varlen_func", "deterministic"),
    "flash2": ("flash_attn_varlen_func", "deterministic"),
    "varlen": ("varlen_attn", "window_size"),
}
"""a function of the module, and the argument that tells a version new enough"""

_WIDEST_HEAD = {"flash3": 128, "flash2": 256, "varlen": 256}
"""flash3 takes wider heads forward, but has no backward pass in a fixed order for them"""


def attend(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None = None) -> Tensor:
    """Causal attention inside each sample.

    Args:
        query: [Tq, H, D]; bfloat16 (or float16) for all backends but `sdpa`.
        key: [T, H_kv, D], H_kv a divisor of H.
        value: [T, H_kv, D].
        packing: where samples lie, and the backend.
        scaling: of the scores; None = 1/√D.

    Returns:
        [Tq, H, D], contiguous.
    """
    return _BACKENDS[packing.backend](query, key, value, packing, scaling)


def obstacle(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why a backend cannot run here, in a few words; empty where it can.

    Args:
        backend: which.
        device: where it computes.
        dtype: what matrix products run in.
        head_dim: D.
    """
    if backend == "sdpa":
        return ""
    if found := _device_obstacle(device, dtype):
        return found
    if backend == "flash3" and torch.cuda.get_device_capability(device)[0] != 9:
        return "needs compute capability 9"
    if backend == "varlen" and not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch is built without flash attention"
    if head_dim > _WIDEST_HEAD[backend] or head_dim % 8:
        return f"takes heads up to {_WIDEST_HEAD[backend]} wide, in eights, not {head_dim}"
    try:
        module = importlib.import_module(_MODULES[backend])
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except (ImportError, OSError, RuntimeError) as error:  # built for another PyTorch
        return f"{_MODULES[backend]} does not load ({str(error).splitlines()[0]})"
    name, argument = _NEEDED[backend]
    function = getattr(module, name, None)
    if function is None or not _takes(function, argument):
        return f"this version of {_MODULES[backend]} has no {name} that takes {argument}"
    return ""


def _device_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why no flash attention at all runs here."""
    if device.type != "cuda":
        return "no GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0"
    return (
        "" if dtype in (torch.bfloat16, torch.float16) else f"needs bfloat16, not {str(dtype).removeprefix('torch.')}"
    )


def _sdpa(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None) -> Tensor:
    """Sample by sample; `split` and not slices, whose gradients would each be as long as the row."""
    groups = query.shape[1] // key.shape[1]
    if query.is_cuda and groups > 1:
        # Grouped heads have no fused kernel there in float32 nor with a mask.
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        groups = 1

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (states.transpose(0, 1)[None] for states in (q, k, v))
        mask = None if packing.is_square else packing.mask[-q.shape[2] :, -k.shape[2] :]
        attended = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1
        )
        return attended[0].transpose(0, 1)

    def all_samples(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        samples = (query.split(packing.queries.lengths), *(s.split(packing.keys.lengths) for s in (key, value)))
        return torch.cat([one(q, k, v) for q, k, v in zip(*samples, strict=True)])

    if not query.is_cuda:  # the order is fixed there
        return all_samples(query, key, value)
    # Not cuDNN's: it plans anew for every length of a sample, and does not keep an order.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        if query.shape[2] % 8:  # matrix products, in an order that cuBLAS alone decides
            return all_samples(query, key, value)
        return fixed_order(all_samples, query, key, value)


def _flash2(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None) -> Tensor:
    """The flash-attn package, version 2.4.1 or newer."""
    flash: Any = importlib.import_module(_MODULES["flash2"])
    return flash.flash_attn_varlen_func(
        query, key, value, **_boundaries(packing), softmax_scale=scaling, causal=True, deterministic=True
    )


def _flash3(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None) -> Tensor:
    """FlashAttention-3, `flash_attn_interface`; its first builds return the log-sum-exp as well."""
    flash: Any = importlib.import_module(_MODULES["flash3"])
    attended = flash.flash_attn_varlen_func(
        query, key, value, **_boundaries(packing), softmax_scale=scaling, causal=True, deterministic=True
    )
    return attended[0] if isinstance(attended, tuple) else attended


def _boundaries(packing: Packing) -> dict[str, Any]:
    """Where samples begin, as both versions of flash-attn name it."""
    queries, keys = packing.queries, packing.keys
    return {
        "cu_seqlens_q": queries.boundaries,
        "cu_seqlens_k": keys.boundaries,
        "max_seqlen_q": queries.longest,
        "max_seqlen_k": keys.longest,
    }


def _varlen(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None) -> Tensor:
    """PyTorch's own flash attention; a window without a right side is its word for causal."""
    varlen: Any = importlib.import_module(_MODULES["varlen"])
    settings: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
    if _takes(varlen.varlen_attn, "enable_gqa"):  # from 2.12; before, fewer keys than queries need no word
        settings["enable_gqa"] = query.shape[1] != key.shape[1]
    queries, keys = packing.queries, packing.keys

    def all_samples(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return varlen.varlen_attn(
            query, key, value, queries.boundaries, keys.boundaries, queries.longest, keys.longest, **settings
        )

    return fixed_order(all_samples, query, key, value)


@cache
def _takes(function: Any, parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


_BACKENDS = {"flash3": _flash3, "flash2": _flash2, "varlen": _varlen, "sdpa": _sdpa}
