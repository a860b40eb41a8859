"""PyTorch's attention with a backward pass that adds in a fixed order.

Its CUDA kernels add up the queries' gradients in whatever order their blocks end, unless
`torch.use_deterministic_algorithms` is on while the backward pass runs. On for a whole step it forbids every op that
has no deterministic form, so it is on for attention's backward alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_before: tuple[bool, bool, bool] | None = None
"""the settings to go back to, while an attention's backward pass runs"""


def _enter() -> None:
    """Turn determinism on."""
    global _before
    settings: Any = torch.utils.deterministic
    if _before is None:  # else a backward pass has raised, and the settings are not the user's
        _before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            settings.fill_uninitialized_memory,
        )
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # would fill every gradient with NaN before it is written


def restore() -> None:
    """Go back to the settings before; to be called by whoever goes on after a backward pass has raised."""
    global _before
    if _before is None:
        return
    enabled, warn_only, fill = _before
    _before = None
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = fill


class _Before(torch.autograd.Function):
    """The identity on attention's result: its backward runs before attention's."""

    @staticmethod
    def forward(ctx: Any, attended: Tensor) -> Tensor:
        return attended.view_as(attended)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _enter()
        return gradients[0]


class _After(torch.autograd.Function):
    """The identity on queries, keys and values: its backward runs once attention's has given all three gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return query.view_as(query), key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        restore()
        return gradients


def fixed_order(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Attention on a GPU whose gradients are the same bits every time.

    Args:
        attention: of query, key and value.
        query: what it is called with.
        key: as well.
        value: as well.
    """
    inner: Any = _After.apply(query, key, value)
    attended: Any = _Before.apply(attention(*inner))
    return attended
