"""Attention over packed rows in float64, sample by sample and spelt out, for tests to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llara_dist.model.packing import Backend, Packing, Segments


def segments(lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
    """Stretches of the given lengths."""
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Segments(tuple(lengths), boundaries.to(device))


def packing(
    backend: Backend, keys: Sequence[int], queries: Sequence[int] | None = None, device: torch.device | str = "cpu"
) -> Packing:
    """Samples of `keys` positions of which the last `queries` ask, or all."""
    asked = segments(keys, device)
    return Packing(asked if queries is None else segments(queries, device), asked, backend)


def random_states(
    packing: Packing, heads: int, kv_heads: int, head_dim: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 queries [Tq, H, D], keys and values [T, H_kv, D]."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = sum(packing.queries.lengths), sum(packing.keys.lengths)
    shapes = ((rows, heads), (columns, kv_heads), (columns, kv_heads))
    query, key, value = (
        torch.randn(*shape, head_dim, generator=generator, dtype=torch.float64).to(packing.keys.boundaries.device)
        for shape in shapes
    )
    return query, key, value


def reference(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None = None) -> Tensor:
    """Softmax of masked scores for each sample by itself, in the dtype of the states; [Tq, H, D]."""
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    results, row, column = [], 0, 0
    for rows, columns in zip(packing.queries.lengths, packing.keys.lengths, strict=True):
        q = query[row : row + rows]
        k, v = (states[column : column + columns].repeat_interleave(groups, dim=1) for states in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        place = torch.arange(columns, device=q.device)
        visible = place[None, :] <= place[columns - rows :, None]
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        results.append(torch.einsum("hqk,khd->qhd", weights, v))
        row, column = row + rows, column + columns
    return torch.cat(results)
