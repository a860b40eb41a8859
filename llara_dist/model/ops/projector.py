"""The projector as one op: item table → linear → GELU → linear → the slots of a packed row.

Three layers: `write_reference` in eager PyTorch, what every kernel is held against; `llara_dist::write_behaviour`, a
functional op with its own backward for CUDA (`projector_kernels`); `write_behaviour_`, the same op in place, which
spares a copy of the row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def project_reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """GELU(x·W1ᵀ + b1)·W2ᵀ + b2 in eager PyTorch; exact (erf) GELU.

    Args:
        x: [U, d] item embeddings.
        w1: [m, d].
        b1: [m].
        w2: [h, m].
        b2: [h].

    Returns:
        [U, h], in the dtype that `x` and the weights promote to (autocast applies).

    Raises:
        ValueError: the shapes do not chain.
    """
    _require_chain(x, w1, b1, w2, b2)
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def write_reference(row: Tensor, behaviour: Tensor, slot_positions: Tensor, slot_inverse: Tensor) -> Tensor:
    """Write projected items into a row, in place, in eager PyTorch.

    Args:
        row: [T, h], requires no gradient.
        behaviour: [U, h].
        slot_positions: int64 [S].
        slot_inverse: int64 [S]: slot s holds item `slot_inverse[s]` of `behaviour`.

    Returns:
        [T, h] in the row's dtype, of which `behaviour` is a part even where S = 0.
    """
    behaviour = behaviour.to(row.dtype)
    if slot_positions.shape[0] == 0:
        return row + 0.0 * behaviour.sum()
    return row.index_copy_(0, slot_positions, behaviour[slot_inverse])


def write_behaviour(
    embeddings: Tensor,
    item_table: Tensor,
    unique_items: Tensor,
    item_slots: Tensor,
    item_offsets: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> Tensor:
    """The row with the projected items at their slots; an item that stands at several slots is projected once.

    Under autocast matrix products take operands of autocast's dtype, else float32; both accumulate in float32, and
    the hidden pre-activation is never rounded. The same input gives the same bits. Nothing waits for the device.
    Between forward and backward only the arguments are kept.

    Args:
        embeddings: [T, h] float32 or bfloat16; positions without a slot stay as they are.
        item_table: [num_items, d] float32, without gradient.
        unique_items: int64 [U], U ≥ 1: rows of the table. The weights have a gradient (zero) even where S = 0.
        item_slots: int64 [S]: slot positions grouped by item (`Batch.item_slots`), each position once.
        item_offsets: int32 [U+1]: where each item's slots begin.
        w1: [m, d] float32.
        b1: [m] float32.
        w2: [h, m] float32.
        b2: [h] float32.

    Returns:
        [T, h], new memory, in the dtype of `embeddings`. Gradients flow to w1, b1, w2, b2 (float32) and to
        `embeddings` (zero at the slots).

    Raises:
        ValueError: the shapes do not chain.
    """
    _require_chain(item_table, w1, b1, w2, b2)
    arguments = (item_table, unique_items, item_slots, item_offsets, w1, b1, w2, b2)
    return _write(embeddings, *arguments, _compute_dtype(embeddings.device.type))


def write_behaviour_(embeddings: Tensor, *arguments: Tensor) -> Tensor:
    """`write_behaviour` in place: `embeddings` [T, h] is overwritten at the slots and returned.

    For a row that was just made and requires no gradient. A custom op may not write into an argument that autograd
    sees, hence an autograd.Function; where torch.compile traces, this is the functional op.
    """
    if torch.compiler.is_compiling():
        return write_behaviour(embeddings, *arguments)
    item_table, *_, w1, b1, w2, b2 = arguments
    _require_chain(item_table, w1, b1, w2, b2)
    return _WriteInPlace.apply(embeddings, *arguments, _compute_dtype(embeddings.device.type))  # pyright: ignore


def output_rms(x: Tensor) -> Tensor:
    """Root mean square over all elements, a float32 scalar."""
    return x.to(torch.float32).square().mean().sqrt()


def _require_chain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    if x.shape[-1] != w1.shape[1] or w1.shape[0] != w2.shape[1] or b1.shape != w1.shape[:1] or b2.shape != w2.shape[:1]:
        shapes = [tuple(t.shape) for t in (x, w1, b1, w2, b2)]
        raise ValueError(f"projector shapes do not chain: x, w1, b1, w2, b2 = {shapes}")


def _compute_dtype(device_type: str) -> torch.dtype:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else torch.float32


def _write_into(
    row: Tensor,
    item_table: Tensor,
    unique_items: Tensor,
    item_slots: Tensor,
    item_offsets: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    compute: torch.dtype,
) -> None:
    """Overwrite the slots of `row`, by the kernels on CUDA, else by the reference."""
    if row.is_cuda:
        from llara_dist.model.ops import projector_kernels

        projector_kernels.write(row, item_table, unique_items, item_slots, item_offsets, w1, b1, w2, b2, compute)
        return
    behaviour = project_reference(*(x.to(compute) for x in (item_table[unique_items], w1, b1, w2, b2)))
    write_reference(row, behaviour, item_slots, _inverse(item_offsets, item_slots))


def _inverse(item_offsets: Tensor, item_slots: Tensor) -> Tensor:
    """Of each grouped slot the number of its item, int64 [S]."""
    numbers = torch.arange(item_offsets.shape[0] - 1, device=item_offsets.device)
    return numbers.repeat_interleave(item_offsets.diff(), output_size=item_slots.shape[0])


@torch.library.custom_op("llara_dist::write_behaviour", mutates_args=())
def _write(
    embeddings: Tensor,
    item_table: Tensor,
    unique_items: Tensor,
    item_slots: Tensor,
    item_offsets: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    compute: torch.dtype,
) -> Tensor:
    row = embeddings.clone(memory_format=torch.contiguous_format)
    _write_into(row, item_table, unique_items, item_slots, item_offsets, w1, b1, w2, b2, compute)
    return row


@_write.register_fake
def _(embeddings: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(embeddings, memory_format=torch.contiguous_format)


@torch.library.custom_op("llara_dist::write_behaviour_backward", mutates_args=())
def _gradients(
    gradient: Tensor,
    item_table: Tensor,
    unique_items: Tensor,
    item_slots: Tensor,
    item_offsets: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w1, b1, w2, b2 from the row's gradient [T, h]."""
    # A backward pass may run inside autocast; what is computed in which dtype is decided here.
    with torch.autocast(gradient.device.type, enabled=False):
        gradient = gradient if gradient.stride(1) == 1 else gradient.contiguous()
        if gradient.is_cuda:
            from llara_dist.model.ops import projector_kernels

            return projector_kernels.gradients(
                gradient, item_table, unique_items, item_slots, item_offsets, w1, b1, w2, compute
            )
        # Autograd does not look into a custom op: the formulas, written out.
        x, w1, b1, w2 = (each.to(compute) for each in (item_table[unique_items], w1, b1, w2))
        at_slots = gradient[item_slots].to(torch.float32)
        sums = at_slots.new_zeros((x.shape[0], at_slots.shape[1]))
        sums = sums.index_add_(0, _inverse(item_offsets, item_slots), at_slots).to(compute)
        before = F.linear(x, w1, b1)
        pre_gradient = torch.ops.aten.gelu_backward(sums @ w2, before)
        return (
            (pre_gradient.T @ x).to(torch.float32),
            pre_gradient.sum(0, dtype=torch.float32),
            (sums.T @ F.gelu(before)).to(torch.float32),
            sums.sum(0, dtype=torch.float32),
        )


@_gradients.register_fake
def _(gradient: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w1, b1, w2, b2 = (torch.empty_like(weight) for weight in arguments[4:8])
    return w1, b1, w2, b2


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *arguments, ctx.compute = inputs
    ctx.save_for_backward(*arguments)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes them at the first reading
    weights: tuple[Tensor | None, ...] = (None,) * 4
    if any(ctx.needs_input_grad[5:9]):
        weights = _gradients(gradient, *saved, ctx.compute)
    row = gradient.index_fill(0, saved[2], 0.0) if ctx.needs_input_grad[0] else None
    return row, None, None, None, None, *weights, None


_write.register_autograd(_backward, setup_context=_save)


class _WriteInPlace(torch.autograd.Function):
    """The op on a row that requires no gradient, without the copy."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, *inputs: Any) -> Tensor:
        ctx.mark_dirty(embeddings)
        _save(ctx, (embeddings, *inputs), embeddings)
        _write_into(embeddings, *inputs)
        return embeddings

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        return _backward(ctx, gradient)
