"""LoRA's two thin products around a frozen linear layer, each one pass over the activations, with own backwards.

    y = base(x) + s·(x ⊙ mask / q)·Aᵀ·Bᵀ        (LoRA, arXiv 2106.09685, with dropout that keeps with probability q)

`lora_down` makes h = (x ⊙ mask)·Aᵀ and hands x through; `lora_up` adds c·h·Bᵀ to the layer's result in place, with
c = s / q. Between them stands the layer itself, as it is:

    x, h = lora_down(x, a, ...)
    y = lora_up(base(x), h, b, ...)

Since x goes through `lora_down` on its way to the layer, its backward gets the layer's gradient of x and adds its own
in the same pass. Saved are x, which layers with the same input share, and h. The mask is made anew in the backward
pass, from a seed; nothing else of it is kept.

On CUDA devices masked products are Triton kernels (`lora_triton.py`). Elsewhere the mask is NumPy's: a quarter of the
time of PyTorch's `bernoulli_`. The two draw different masks from the same seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVELS = 1 << 16
"""an element is kept by comparing 16 random bits, so probabilities are multiples of 2⁻¹⁶"""


def kept_levels(dropout: float) -> int:
    """How many of `LEVELS` keep an element: (1 − p)·2¹⁶, rounded; at least one, so that 1 / q is finite."""
    return max(1, round((1.0 - dropout) * LEVELS))


def draw_seed() -> Tensor:
    """A seed from PyTorch's CPU generator, a scalar int64 on the host.

    The host reads it without waiting for a device. Recomputation under activation checkpointing restores that generator
    and draws it again. It never fits 32 bits, so that a kernel is compiled for one type of it.
    """
    return torch.randint(1 << 32, 1 << 62, (), dtype=torch.int64, device="cpu")


def lora_down(
    x: Tensor, a: Tensor, dtype: torch.dtype, kept: int = LEVELS, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The first product, (x ⊙ mask)·Aᵀ, and x for the base layer.

    Args:
        x: [..., in], any float dtype.
        a: [r, in] float32.
        dtype: that the product is computed in, sums in float32.
        kept: of `LEVELS`; all of them mean no dropout.
        seed: of the mask, as `draw_seed` returns it; None without dropout.

    Returns:
        x itself, to be given to the base layer and nothing else, and h [N, r] in `dtype`, N = x's rows. h is not yet
        divided by the probability to be kept.

    Raises:
        ValueError: the shapes do not chain, or there is dropout without a seed.
    """
    if x.shape[-1] != a.shape[1]:
        raise ValueError(f"LoRA's shapes do not chain: x {tuple(x.shape)}, A {tuple(a.shape)}")
    if kept < LEVELS and seed is None:
        raise ValueError("LoRA's dropout needs a seed")
    return _Down.apply(x, a, dtype, kept, seed)  # pyright: ignore[reportReturnType]


def lora_up(y: Tensor, h: Tensor, b: Tensor, factor: float) -> Tensor:
    """The second product, added in place: y + factor·h·Bᵀ.

    Args:
        y: [..., out] contiguous, the base layer's result; overwritten.
        h: [N, r], as `lora_down` returns it, N = y's rows.
        b: [out, r] float32.
        factor: LoRA's scale over the probability to be kept.

    Returns:
        y.

    Raises:
        ValueError: the shapes do not chain.
    """
    if y.shape[-1] != b.shape[0] or h.shape[1] != b.shape[1] or y.numel() != h.shape[0] * b.shape[0]:
        raise ValueError(f"LoRA's shapes do not chain: y, h, B = {[tuple(t.shape) for t in (y, h, b)]}")
    return _Up.apply(y, h, b, factor)  # pyright: ignore[reportReturnType]


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, dtype: torch.dtype, kept: int, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows, weight = _rows(x), a.to(dtype)
        if seed is None:
            h = rows.to(dtype) @ weight.t()
        elif x.is_cuda:
            h = masked_down(rows, weight, seed, kept)
        else:
            h = (rows.to(dtype) * dropout_mask(seed, rows.shape[0], rows.shape[1], kept, dtype)) @ weight.t()
        ctx.save_for_backward(x, a, seed)
        ctx.kept, ctx.dtype = kept, dtype
        return x.view_as(x), h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from_base, dh = gradients
        x, a, seed = ctx.saved_tensors
        rows, dx, weight = _rows(x), _rows(from_base), a.to(ctx.dtype)
        if seed is None:
            da = _float32_product(dh.t(), rows.to(ctx.dtype))
            dx = torch.addmm(dx, dh, weight) if dx.dtype == ctx.dtype else dx + dh @ weight
        elif x.is_cuda:
            dx, da = masked_down_backward(dx, dh.contiguous(), rows, weight, seed, ctx.kept)
        else:
            mask = dropout_mask(seed, rows.shape[0], rows.shape[1], ctx.kept, ctx.dtype)
            da = _float32_product(dh.t(), rows.to(ctx.dtype) * mask)
            dx = torch.addcmul(dx, dh @ weight, mask)
        return dx.to(x.dtype).view_as(x), da.to(a.dtype), None, None, None


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, b: Tensor, factor: float) -> Tensor:
        rows = y.view(-1, y.shape[-1])
        # `out` is the first argument: one pass that reads and writes, where addmm alone would copy y first.
        torch.addmm(rows, h.to(y.dtype), _scaled(b, factor, y.dtype).t(), out=rows)
        ctx.mark_dirty(y)
        ctx.save_for_backward(h, b)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        h, b = ctx.saved_tensors
        rows = _rows(dy)
        # Both with the short side first: several times faster on the CPU than the transposed products.
        dh = (_scaled(b, ctx.factor, dy.dtype).t() @ rows.t()).t()
        db = _float32_product(h.to(dy.dtype).t(), rows).t() * ctx.factor
        return dy, dh.to(h.dtype), db.contiguous().to(b.dtype), None


def _rows(x: Tensor) -> Tensor:
    """[..., n] → [N, n], contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _scaled(b: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """The scale goes into the small matrix, before it is rounded: activations see no further pass and rounding."""
    return (b * factor).to(dtype)


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """Sums over all tokens; float32 as they leave the accumulators, where the device can."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right).to(torch.float32)


@torch.library.custom_op("llara_dist::dropout_mask", mutates_args=(), device_types="cpu")
def dropout_mask(seed: Tensor, rows: int, columns: int, kept: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] of ones, and zeros with probability 1 − kept / `LEVELS`, on the host; a function of the seed.

    One op, so that a compiled graph holds the draw and not what was drawn when it was traced.
    """
    count = rows * columns
    words = np.random.SFC64(int(seed)).random_raw(-(-count // 4))
    ones = (words.view(np.uint16)[:count] < kept) if kept < LEVELS else np.ones(count, np.bool_)
    return torch.from_numpy(ones.view(np.uint8)).to(dtype).view(rows, columns)


@dropout_mask.register_fake
def _(seed: Tensor, rows: int, columns: int, kept: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((rows, columns), dtype=dtype)


@torch.library.custom_op("llara_dist::lora_masked_down", mutates_args=(), device_types="cuda")
def masked_down(x: Tensor, a: Tensor, seed: Tensor, kept: int) -> Tensor:
    """(x ⊙ mask)·Aᵀ without the mask or the product ever being written.

    Args:
        x: [N, in] contiguous.
        a: [r, in] contiguous, in the dtype to compute in.
        seed: on the host.
        kept: of `LEVELS`.

    Returns:
        [N, r] in `a`'s dtype.
    """
    from llara_dist.model.ops import lora_triton

    return lora_triton.masked_down(x, a, int(seed), kept)


@masked_down.register_fake
def _(x: Tensor, a: Tensor, seed: Tensor, kept: int) -> Tensor:
    return a.new_empty((x.shape[0], a.shape[0]))


@torch.library.custom_op("llara_dist::lora_masked_down_backward", mutates_args=(), device_types="cuda")
def masked_down_backward(
    dx: Tensor, dh: Tensor, x: Tensor, a: Tensor, seed: Tensor, kept: int
) -> tuple[Tensor, Tensor]:
    """dx + mask ⊙ (dh·A) and dhᵀ·(x ⊙ mask), with the mask of `masked_down`, in one pass over x and dx.

    Args:
        dx: [N, in] contiguous, the base layer's gradient of x.
        dh: [N, r] contiguous, in `a`'s dtype.
        x: [N, in] contiguous.
        a: [r, in] contiguous.
        seed: on the host.
        kept: of `LEVELS`.

    Returns:
        [N, in] in `dx`'s dtype, and [r, in] float32. The same from run to run: sums have a fixed order.
    """
    from llara_dist.model.ops import lora_triton

    return lora_triton.masked_down_backward(dx, dh, x, a, int(seed), kept)


@masked_down_backward.register_fake
def _(dx: Tensor, dh: Tensor, x: Tensor, a: Tensor, seed: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dx), torch.empty_like(a, dtype=torch.float32)
