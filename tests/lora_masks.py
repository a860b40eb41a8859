"""The mask that `lora_triton.py` draws, written out in whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


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
