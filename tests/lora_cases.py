"""What tests of LoRA's ops share: an adapted layer, errors, and the mask of `lora_triton.py` in whole tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SCALE = 4.0
"""of `peft_linear`'s adapters"""
LOW = 0xFFFFFFFF


def peft_linear(base: nn.Linear, dropout: float = 0.0, bits: int = 32, **settings: Any) -> nn.Module:
    """A linear layer with an adapter whose B is not zero."""
    import peft

    config = peft.LoraConfig(
        r=8, lora_alpha=round(8 * SCALE), lora_dropout=dropout, target_modules=["linear"], **settings
    )
    holder: Any = nn.ModuleDict({"linear": base.requires_grad_(False)})
    holder.is_loaded_in_4bit = bits == 4
    adapted: Any = peft.inject_adapter_in_model(config, holder)
    adapted["linear"].lora_B["default"].weight.data.normal_(0.0, 0.3)
    for matrices in (adapted["linear"].lora_A, adapted["linear"].lora_B):
        matrices.to(torch.float32)  # as in a run, whatever the layer's weights are
    return adapted


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of what is exact."""
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


def reference_mask(seed: int, rows: int, columns: int, kept: int) -> Tensor:
    """[rows, columns] of booleans; 32-bit arithmetic in int64."""
    low, high = seed & LOW, seed >> 32
    one = mix((torch.arange(rows) * 0x9E3779B9 + low) & LOW, high)
    other = mix(one, low)
    bits = mix((one[:, None] + torch.arange(columns) * 0x9E3779B9) & LOW, other[:, None])
    return (bits >> 16) < kept


def mix(value: Tensor, key: Tensor | int) -> Tensor:
    """MurmurHash3's finalizer with a key in the middle, of numbers below 2³²."""
    value = (multiply(value ^ (value >> 16), 0x85EBCA6B) + key) & LOW
    value = multiply(value ^ (value >> 13), 0xC2B2AE35)
    return value ^ (value >> 16)


def multiply(value: Tensor, factor: int) -> Tensor:
    """The low 32 bits of a product that may not fit 63."""
    return (value * (factor & 0xFFFF) + (((value * (factor >> 16)) & LOW) << 16)) & LOW
