"""Rows for the fused projector, and how far an implementation is from float64 compared with eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llara_dist.model.ops.projector import project_reference, write_reference


@dataclass(frozen=True)
class Case:
    """Sizes of one row: T positions, U items, widths d, m, h; slot s holds item `item_of_slot[s]`."""

    positions: int
    items: int
    item_dim: int
    hidden: int
    width: int
    item_of_slot: tuple[int, ...]


def spread(slots: int, items: int) -> tuple[int, ...]:
    """Items of so many slots: each at least once, the rest drawn; in no order."""
    generator = torch.Generator().manual_seed(slots)
    drawn = torch.cat([torch.arange(items), torch.randint(items, (slots - items,), generator=generator)])
    return tuple(drawn[torch.randperm(slots, generator=generator)].tolist())


CASES = {
    "no slot": Case(9, 1, 5, 7, 3, ()),
    "one item everywhere": Case(41, 1, 9, 41, 70, (0,) * 37),
    "few items": Case(53, 17, 33, 130, 261, spread(40, 17)),
    "two steps of each product": Case(90, 41, 41, 70, 135, spread(60, 41)),
    "spans of long sums": Case(30, 3, 8, 530, 300, spread(20, 3)),
    "two tiles of items": Case(211, 135, 16, 35, 130, spread(180, 135)),
}


@dataclass(frozen=True)
class Row:
    """The op's arguments in its order, and a gradient of the result, on one device."""

    embeddings: Tensor
    item_table: Tensor
    unique_items: Tensor
    item_slots: Tensor
    item_offsets: Tensor
    weights: tuple[Tensor, ...]
    gradient: Tensor
    slot_inverse: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """What `write_behaviour` takes after the embeddings."""
        return (self.item_table, self.unique_items, self.item_slots, self.item_offsets, *self.weights)


def make_row(case: Case, dtype: torch.dtype, device: str = "cpu") -> Row:
    """Random weights, embeddings and slots; embeddings and gradient are `dtype`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inverse = torch.tensor(case.item_of_slot, dtype=torch.int64)
    slots = torch.randperm(case.positions, generator=generator)[: len(inverse)].sort().values
    order = torch.argsort(inverse, stable=True)
    uses = torch.bincount(inverse, minlength=case.items)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), uses.cumsum(0)]).to(torch.int32)
    weights = (
        normal(case.hidden, case.item_dim) / case.item_dim**0.5,
        normal(case.hidden),
        normal(case.width, case.hidden) / case.hidden**0.5,
        normal(case.width),
    )
    table = normal(2 * case.items + 3, case.item_dim)
    unique = torch.randperm(len(table), generator=generator)[: case.items].sort().values
    return Row(
        embeddings=normal(case.positions, case.width).to(device, dtype),
        item_table=table.to(device),
        unique_items=unique.to(device),
        item_slots=slots[order].to(device),
        item_offsets=offsets.to(device),
        weights=tuple(weight.to(device) for weight in weights),
        gradient=normal(case.positions, case.width).to(device, dtype),
        slot_inverse=inverse[order].to(device),
    )


def eager(row: Row, dtype: torch.dtype, compute: torch.dtype) -> tuple[Tensor, ...]:
    """The written row and the gradients of w1, b1, w2, b2, by plain PyTorch with float32 or float64 weights."""
    weights = [weight.to(dtype).requires_grad_() for weight in row.weights]
    with torch.autocast(row.embeddings.device.type, compute, enabled=compute != dtype):
        behaviour = project_reference(row.item_table[row.unique_items].to(dtype), *weights)
    embeddings = row.embeddings.to(torch.float64 if dtype == torch.float64 else row.embeddings.dtype)
    written = write_reference(embeddings.clone(), behaviour, row.item_slots, row.slot_inverse)
    return written.detach(), *torch.autograd.grad(written, weights, row.gradient.to(written.dtype))


def check(case: Case, compute: torch.dtype, device: str, fused: Callable[[Row], tuple[Tensor, ...]]) -> None:
    """Of each result the largest error against float64 is at most twice eager's, or one float32 rounding or two.

    Both round their operands alike and accumulate in float32; what may differ is the order of additions.
    """
    row = make_row(case, compute, device)
    exact = eager(row, torch.float64, torch.float64)
    plain = eager(row, torch.float32, compute)
    found = fused(row)
    untouched = torch.ones(case.positions, dtype=torch.bool, device=device)
    untouched[row.item_slots] = False
    assert torch.equal(found[0][untouched], row.embeddings[untouched])
    for name, mine, other, truth in zip(("row", "w1", "b1", "w2", "b2"), found, plain, exact, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype), name
        if not case.item_of_slot and name != "row":
            assert torch.equal(mine, torch.zeros_like(mine)), name
            continue
        floor = 2 * torch.finfo(torch.float32).eps * float(truth.abs().max())
        error, allowed = float((mine - truth).abs().max()), 2 * float((other - truth).abs().max()) + floor
        assert error <= allowed, (name, error, allowed)
