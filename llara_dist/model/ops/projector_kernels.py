"""Triton kernels of the projector: gather, two linear layers and GELU, scattered into the packed row; and the way back.

Shapes: U distinct items, d item width, m hidden width, h model width, S slots, T positions. A row's slots come grouped
by item (`item_slots` [S], `item_offsets` [U+1]), so one program owns all slots of its items: nothing is sorted, added
atomically or read back by the host, and the same input gives the same bits. Matrix products take operands of the
`COMPUTE` type and accumulate in float32; weights are read as they are stored and converted in registers.

The block sizes depend on shapes alone. Autotuning could choose otherwise on the next start, and with another order of
additions a resumed run would no longer be the same run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SPAN = tl.constexpr(8)
"""steps of a float32 product that are summed by themselves before they are added to the rest"""


@triton.jit
def _add_product(
    total, left, right, right_step, in_use, column_in_use, first, last,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total + left·right over the inner elements `first` to `last`, float32 [rows, columns].

    `left` [rows, 1] and `right` [1, columns] point to a row's and a column's element 0. A row's elements lie together,
    a column's `right_step` apart.
    """
    for start in range(first, last, BLOCK):
        inner = start + tl.arange(0, BLOCK)
        x = tl.load(left + inner[None, :], mask=in_use[:, None] & (inner < last)[None, :], other=0.0)
        w = tl.load(
            right + inner.to(tl.int64)[:, None] * right_step,
            mask=column_in_use[None, :] & (inner < last)[:, None],
            other=0.0,
        )
        total = tl.dot(x.to(COMPUTE), w.to(COMPUTE), total, input_precision="ieee")
    return total


@triton.jit
def _tile_product(
    left, right, right_step, in_use, column_in_use, length,
    COMPUTE: tl.constexpr, BLOCK_ITEMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """left·right over all `length` inner elements, float32 [BLOCK_ITEMS, BLOCK_COLUMNS]; arguments of `_add_product`.

    In float32 sums of `SPAN` steps are added up: thousands of terms one after another would err several times as far as
    cuBLAS, which splits long sums. In bfloat16 the operands' own rounding is far larger.
    """
    total = tl.zeros((BLOCK_ITEMS, BLOCK_COLUMNS), dtype=tl.float32)
    if tl.float32 == COMPUTE:
        for first in range(0, length, SPAN * BLOCK):
            last = tl.minimum(first + SPAN * BLOCK, length)
            part = tl.zeros((BLOCK_ITEMS, BLOCK_COLUMNS), dtype=tl.float32)
            total += _add_product(
                part, left, right, right_step, in_use, column_in_use, first, last, COMPUTE, BLOCK
            )  # fmt: skip
    else:
        total = _add_product(
            total, left, right, right_step, in_use, column_in_use, 0, length, COMPUTE, BLOCK
        )  # fmt: skip
    return total


@triton.jit
def _pre_activation(
    item_table, items, in_use, w1, b1, columns, num_hidden, item_dim,
    COMPUTE: tl.constexpr, BLOCK_ITEMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """x·W1ᵀ + b1 of a tile, float32 [BLOCK_ITEMS, BLOCK_COLUMNS]; `items` are rows of the table, masked by `in_use`."""
    column_in_use = columns < num_hidden
    total = _add_product(
        tl.zeros((BLOCK_ITEMS, BLOCK_COLUMNS), dtype=tl.float32),
        item_table + items[:, None] * item_dim, w1 + columns.to(tl.int64)[None, :] * item_dim, 1,
        in_use, column_in_use, 0, item_dim, COMPUTE, BLOCK_DIM,
    )  # fmt: skip
    return total + tl.load(b1 + columns, mask=column_in_use, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _normal_cdf(x):
    """Φ(x), float32: exact GELU is x·Φ(x)."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["num_items"])
def hidden_kernel(
    item_table, unique_items, w1, b1, hidden, num_items, num_hidden, item_dim,
    COMPUTE: tl.constexpr, BLOCK_ITEMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """hidden [U, m] = GELU(item_table[unique_items]·W1ᵀ + b1); grid (⌈U/BLOCK_ITEMS⌉, ⌈m/BLOCK_COLUMNS⌉)."""
    rows = tl.program_id(0) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_use = rows < num_items
    items = tl.load(unique_items + rows, mask=in_use, other=0)
    x = _pre_activation(
        item_table, items, in_use, w1, b1, columns, num_hidden, item_dim,
        COMPUTE, BLOCK_ITEMS, BLOCK_COLUMNS, BLOCK_DIM,
    )  # fmt: skip
    tl.store(
        hidden + rows.to(tl.int64)[:, None] * num_hidden + columns[None, :],
        (x * _normal_cdf(x)).to(hidden.dtype.element_ty),
        mask=in_use[:, None] & (columns < num_hidden)[None, :],
    )


@triton.jit(do_not_specialize=["num_items"])
def output_kernel(
    hidden, w2, b2, item_slots, item_offsets, row, row_stride, num_items, num_hidden, width,
    COMPUTE: tl.constexpr, BLOCK_ITEMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """row[all slots of u] = hidden[u]·W2ᵀ + b2; grid (⌈U/BLOCK_ITEMS⌉, ⌈h/BLOCK_COLUMNS⌉).

    Tiles of the same columns follow each other in the grid, so that W2 comes from memory once and then from the cache.
    """
    rows = tl.program_id(0) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_use = rows < num_items
    column_in_use = columns < width
    left = hidden + rows.to(tl.int64)[:, None] * num_hidden
    right = w2 + columns.to(tl.int64)[None, :] * num_hidden
    total = _tile_product(
        left, right, 1, in_use, column_in_use, num_hidden, COMPUTE, BLOCK_ITEMS, BLOCK_COLUMNS, BLOCK_HIDDEN
    )  # fmt: skip
    total += tl.load(b2 + columns, mask=column_in_use, other=0.0).to(tl.float32)[None, :]
    behaviour = total.to(row.dtype.element_ty)
    first = tl.load(item_offsets + rows, mask=in_use, other=0)
    uses = tl.load(item_offsets + rows + 1, mask=in_use, other=0) - first
    for use in range(tl.max(uses, axis=0)):  # pyright: ignore[reportArgumentType]
        more = use < uses
        positions = tl.load(item_slots + first + use, mask=more, other=0)
        tl.store(
            row + positions[:, None] * row_stride + columns[None, :],
            behaviour,
            mask=more[:, None] & column_in_use[None, :],
        )


@triton.jit
def slot_sum_kernel(
    gradient, gradient_stride, item_slots, item_offsets, sums, width,
    BLOCK_SLOTS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums [U, h]: of each item the row's gradient over its slots, added in float32; grid (U, ⌈h/BLOCK_COLUMNS⌉)."""
    item = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_in_use = columns < width
    first = tl.load(item_offsets + item)
    last = tl.load(item_offsets + item + 1)
    total = tl.zeros((BLOCK_SLOTS, BLOCK_COLUMNS), dtype=tl.float32)
    for start in range(first, last, BLOCK_SLOTS):
        slots = start + tl.arange(0, BLOCK_SLOTS)
        positions = tl.load(item_slots + slots, mask=slots < last, other=0)
        total += tl.load(
            gradient + positions[:, None] * gradient_stride + columns[None, :],
            mask=(slots < last)[:, None] & column_in_use[None, :],
            other=0.0,
        ).to(tl.float32)
    tl.store(
        sums + item.to(tl.int64) * width + columns,
        tl.sum(total, axis=0).to(sums.dtype.element_ty),
        mask=column_in_use,
    )


@triton.jit(do_not_specialize=["num_items"])
def hidden_backward_kernel(
    item_table, unique_items, w1, b1, w2, sums, hidden, pre_gradient, num_items, num_hidden, item_dim, width,
    COMPUTE: tl.constexpr, BLOCK_ITEMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """hidden [U, m] once more, and pre_gradient [U, m] = (sums·W2) ⊙ GELU′; grid (⌈U/BLOCK_ITEMS⌉, ⌈m/BLOCK_COLUMNS⌉).

    The pre-activation is recomputed (d products an element) instead of kept from the forward pass.
    """
    rows = tl.program_id(0) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_use = rows < num_items
    column_in_use = columns < num_hidden
    left = sums + rows.to(tl.int64)[:, None] * width
    total = _tile_product(
        left, w2 + columns[None, :], num_hidden, in_use, column_in_use, width,
        COMPUTE, BLOCK_ITEMS, BLOCK_COLUMNS, BLOCK_WIDTH,
    )  # fmt: skip
    items = tl.load(unique_items + rows, mask=in_use, other=0)
    x = _pre_activation(
        item_table, items, in_use, w1, b1, columns, num_hidden, item_dim,
        COMPUTE, BLOCK_ITEMS, BLOCK_COLUMNS, BLOCK_DIM,
    )  # fmt: skip
    below = _normal_cdf(x)
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    places = rows.to(tl.int64)[:, None] * num_hidden + columns[None, :]
    inside = in_use[:, None] & column_in_use[None, :]
    tl.store(hidden + places, (x * below).to(hidden.dtype.element_ty), mask=inside)
    tl.store(pre_gradient + places, (total * (below + x * density)).to(pre_gradient.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Launches:
    """Compile-time arguments of every kernel for one number of items and one compute type.

    Attributes:
        num_items: U.
        items, columns: a program's tile.
        hidden, output, slot_sum, hidden_backward: by kernel, tile sizes, warps and software-pipeline stages.
    """

    num_items: int
    items: int
    columns: int
    hidden: dict[str, Any]
    output: dict[str, Any]
    slot_sum: dict[str, Any]
    hidden_backward: dict[str, Any]

    @classmethod
    def of(cls, num_items: int, compute: torch.dtype) -> Launches:
        """Tiles by the number of distinct items.

        Few items: W2 is read once and nothing else counts, so narrow column tiles spread the reading over the GPU.
        Many: wide tiles, because every tile of items reads all of W2 from the cache again.
        """
        items = min(max(triton.next_power_of_2(num_items), 16), 128)
        if compute == torch.float32:
            items, columns, inner, warps, stages = min(items, 64), 64, 32, 4 if items < 64 else 8, 2
        elif items <= 32:
            columns, inner, warps, stages = 32, 128, 4, 3
        elif items == 64:
            columns, inner, warps, stages = 64, 64, 4, 3
        else:
            columns, inner, warps, stages = 128, 64, 8, 3
        tile = {
            "COMPUTE": {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}[compute],
            "BLOCK_ITEMS": items,
            "BLOCK_COLUMNS": columns,
            "num_warps": warps,
            "num_stages": stages,
        }
        return cls(
            num_items,
            items,
            columns,
            hidden=tile | {"BLOCK_DIM": 32},
            output=tile | {"BLOCK_HIDDEN": inner},
            # Eight slots in flight: most items stand in a row a few times.
            slot_sum={"BLOCK_SLOTS": 8, "BLOCK_COLUMNS": 256, "num_warps": 4, "num_stages": 3},
            hidden_backward=tile | {"BLOCK_WIDTH": inner, "BLOCK_DIM": 32},
        )

    def grid(self, columns: int) -> tuple[int, int]:
        """Programs over [U, columns]."""
        return triton.cdiv(self.num_items, self.items), triton.cdiv(columns, self.columns)

    def slot_sum_grid(self, columns: int) -> tuple[int, int]:
        """Programs of `slot_sum_kernel`, one an item."""
        return self.num_items, triton.cdiv(columns, self.slot_sum["BLOCK_COLUMNS"])


def write(
    row: Tensor, item_table: Tensor, unique_items: Tensor, item_slots: Tensor, item_offsets: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, compute: torch.dtype,
) -> None:  # fmt: skip
    """Write the behaviour embeddings into `row` [T, h], whose elements of a position lie together.

    A transient [U, m] in `compute` passes between the two layers; recomputing it in every column tile of the second
    layer would cost ⌈h/128⌉ times the exponentials, far more time than its bytes.
    """
    num_items, (num_hidden, item_dim), width = unique_items.shape[0], w1.shape, w2.shape[0]
    launches = Launches.of(num_items, compute)
    item_table, w1, w2 = item_table.contiguous(), w1.contiguous(), w2.contiguous()
    hidden = torch.empty((num_items, num_hidden), dtype=compute, device=row.device)
    with torch.cuda.device_of(row):
        hidden_kernel[launches.grid(num_hidden)](
            item_table, unique_items, w1, b1, hidden, num_items, num_hidden, item_dim, **launches.hidden
        )
        output_kernel[launches.grid(width)](
            hidden, w2, b2, item_slots, item_offsets, row, row.stride(0), num_items, num_hidden, width,
            **launches.output,
        )  # fmt: skip


def gradients(
    gradient: Tensor, item_table: Tensor, unique_items: Tensor, item_slots: Tensor, item_offsets: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Float32 gradients of w1, b1, w2, b2 from the row's gradient [T, h], whose elements of a position lie together.

    The weights' own gradients are plain products of two matrices, where nothing is left to fuse: cuBLAS, with float32
    results straight from its accumulators.
    """
    num_items, (num_hidden, item_dim), width = unique_items.shape[0], w1.shape, w2.shape[0]
    launches = Launches.of(num_items, compute)
    item_table, w1, w2 = item_table.contiguous(), w1.contiguous(), w2.contiguous()
    sums = torch.empty((num_items, width), dtype=compute, device=gradient.device)
    hidden = torch.empty((num_items, num_hidden), dtype=compute, device=gradient.device)
    pre_gradient = torch.empty_like(hidden)
    with torch.cuda.device_of(gradient):
        slot_sum_kernel[launches.slot_sum_grid(width)](
            gradient, gradient.stride(0), item_slots, item_offsets, sums, width, **launches.slot_sum
        )
        hidden_backward_kernel[launches.grid(num_hidden)](
            item_table, unique_items, w1, b1, w2, sums, hidden, pre_gradient, num_items, num_hidden, item_dim, width,
            **launches.hidden_backward,
        )  # fmt: skip
    items = item_table[unique_items].to(compute)
    return (
        _product(pre_gradient, items),
        pre_gradient.sum(0, dtype=torch.float32),
        _product(sums, hidden),
        sums.sum(0, dtype=torch.float32),
    )


def _product(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ·right in float32, [U, a] and [U, b] → [a, b]."""
    if left.dtype == torch.float32:
        return left.T @ right
    if left.is_cuda:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return left.T.to(torch.float32) @ right.to(torch.float32)
