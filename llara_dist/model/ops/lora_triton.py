"""Triton kernels of LoRA's first product under dropout, forward and backward; `lora.py` says what they compute.

The mask is a function of (seed, row, column) alone, so neither the sizes of a kernel's tiles nor their order change
what is dropped. Each element hashes its own position: a Weyl sequence along the row, keyed by the row, through
MurmurHash3's finalizer, as in SplitMix (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA'14). That is about a dozen integer instructions an element. Philox takes about seventy for four words even in its
seven rounds: as cheap only if every bit of them is used, and then words have to be moved between threads to where their
elements are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WEYL = tl.constexpr(0x9E3779B9)
FIRST, SECOND = tl.constexpr(0x85EBCA6B), tl.constexpr(0xC2B2AE35)


@triton.jit
def _mix(value, key):
    """MurmurHash3's 32-bit finalizer with a key added in the middle."""
    value = (value ^ (value >> 16)) * FIRST + key
    value = (value ^ (value >> 13)) * SECOND
    return value ^ (value >> 16)


@triton.jit
def kept_mask(seed, rows, columns, kept):
    """Which elements are kept: [rows, columns] of booleans."""
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    one = _mix(rows.to(tl.uint32) * WEYL + low, high)
    other = _mix(one, low)
    bits = _mix(one[:, None] + (columns.to(tl.uint32) * WEYL)[None, :], other[:, None])
    return (bits >> 16).to(tl.int32) < kept


@triton.jit(do_not_specialize=["seed", "kept", "tokens"])
def down_kernel(
    x,
    a,
    h,
    seed,
    kept,
    tokens,
    inputs,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h[ROWS, RANK] = (x ⊙ mask)·Aᵀ, one program for all columns of its rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, PADDED_RANK)
    x_rows = x + rows[:, None].to(tl.int64) * inputs
    total = tl.zeros((ROWS, PADDED_RANK), tl.float32)
    for first in range(0, inputs, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < inputs
        values = tl.load(x_rows + columns[None, :], mask=(rows < tokens)[:, None] & inside[None, :], other=0.0)
        weights = tl.load(
            a + ranks[None, :] * inputs + columns[:, None], mask=(ranks < RANK)[None, :] & inside[:, None], other=0.0
        )
        mask = kept_mask(seed, rows, columns, kept)
        values = tl.where(mask, values, 0.0).to(weights.dtype)
        total = tl.dot(values, weights, total, input_precision=PRECISION)
    at = rows[:, None].to(tl.int64) * RANK + ranks[None, :]
    tl.store(h + at, total.to(h.dtype.element_ty), mask=(rows < tokens)[:, None] & (ranks < RANK)[None, :])


@triton.jit(do_not_specialize=["seed", "kept", "tokens", "rows_per_part"])
def down_backward_kernel(
    dx,
    dh,
    x,
    a,
    out,
    parts,
    seed,
    kept,
    tokens,
    inputs,
    rows_per_part,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = dx + mask ⊙ (dh·A), and this part's rows' share of dhᵀ·(x ⊙ mask); one program for COLUMNS of a part."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    inside = columns < inputs
    ranks = tl.arange(0, PADDED_RANK)
    small = (ranks < RANK)[:, None] & inside[None, :]
    weights = tl.load(a + ranks[:, None] * inputs + columns[None, :], mask=small, other=0.0)
    total = tl.zeros((PADDED_RANK, COLUMNS), tl.float32)
    for start in range(part * rows_per_part, tl.minimum((part + 1) * rows_per_part, tokens), ROWS):
        rows = start + tl.arange(0, ROWS)
        here = (rows < tokens)[:, None]
        at = rows[:, None].to(tl.int64) * inputs + columns[None, :]
        values = tl.load(x + at, mask=here & inside[None, :], other=0.0)
        from_base = tl.load(dx + at, mask=here & inside[None, :], other=0.0)
        gradients = tl.load(
            dh + rows[:, None].to(tl.int64) * RANK + ranks[None, :], mask=here & (ranks < RANK)[None, :], other=0.0
        )
        mask = kept_mask(seed, rows, columns, kept)
        values = tl.where(mask, values, 0.0).to(weights.dtype)
        total = tl.dot(tl.trans(gradients), values, total, input_precision=PRECISION)
        own = tl.where(mask, tl.dot(gradients, weights, input_precision=PRECISION), 0.0)
        tl.store(out + at, (from_base + own).to(out.dtype.element_ty), mask=here & inside[None, :])
    tl.store(parts + (part * RANK + ranks[:, None]) * inputs + columns[None, :], total, mask=small)


def masked_down(x: Tensor, a: Tensor, seed: int, kept: int) -> Tensor:
    """Launch `down_kernel`; arguments as in `lora.masked_down`."""
    tokens, rank = x.shape[0], a.shape[0]
    h = a.new_empty((tokens, rank))
    constants = tile(rank, a.dtype)
    with torch.cuda.device_of(x):
        down_kernel[(triton.cdiv(tokens, constants["ROWS"]),)](x, a, h, seed, kept, tokens, x.shape[1], **constants)
    return h


def masked_down_backward(dx: Tensor, dh: Tensor, x: Tensor, a: Tensor, seed: int, kept: int) -> tuple[Tensor, Tensor]:
    """Launch `down_backward_kernel`; arguments as in `lora.masked_down_backward`."""
    (tokens, inputs), rank = x.shape, a.shape[0]
    constants = tile(rank, a.dtype)
    # A function of the sizes alone, so that sums have the same order in every run and on every device.
    rows_per_part = constants["ROWS"] * max(1, triton.cdiv(tokens, constants["ROWS"] * PARTS))
    count = triton.cdiv(tokens, rows_per_part)
    out, parts = torch.empty_like(dx), a.new_empty((count, rank, inputs), dtype=torch.float32)
    with torch.cuda.device_of(x):
        down_backward_kernel[(triton.cdiv(inputs, constants["COLUMNS"]), count)](
            dx, dh, x, a, out, parts, seed, kept, tokens, inputs, rows_per_part, **constants
        )
    return out, parts.sum(0)


PARTS = 16
"""of the rows in the backward pass, each with its own partial sum: 4096 columns then make 1024 programs"""


def tile(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """The kernels' constants and launch options: tiles that stay in registers."""
    padded = max(16, triton.next_power_of_2(rank))
    single = dtype == torch.float32
    return {
        "RANK": rank,
        "ROWS": 16 if single else 32,
        "COLUMNS": 32 if single and padded > 16 else 64,
        "PADDED_RANK": padded,
        "PRECISION": "ieee" if single else "tf32",
        "num_warps": 4 if padded <= 64 else 8,
    }
