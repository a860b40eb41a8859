"""Whether settings compute the same: loss and gradient without dropout, against those of the start."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llara_dist.autotune.models import Models
from llara_dist.autotune.rows import Rows, backward
from llara_dist.autotune.settings import Setting

TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 2e-1)}
"""by compute type: largest relative difference of the loss, and of the gradient in its norm. A gradient passes some 20
roundings a layer, of 2^-24 or 2^-9 each, which add up as a random walk: over 80 layers to 2e-6 or 8e-2 on either side.
Float32 is given more, since sums of thousands of terms are taken in other orders; bfloat16 sums in float32. The loss is
a mean over many tokens. What this cannot tell from rounding in bfloat16 the kernels' own tests have to."""


class Agreement:
    """Settings against the first one that is asked for.

    Args:
        models: what is loaded.
        rows: what goes through it.
        dtype: what matrix products run in.
    """

    def __init__(self, models: Models, rows: Rows, dtype: torch.dtype) -> None:
        self._models, self._rows, self._dtype = models, rows, dtype
        self._reference: tuple[float, dict[str, Tensor]] | None = None

    def difference(self, setting: Setting) -> str:
        """How loss and gradient differ from those of the first setting beyond rounding; "" where they agree.

        Raises:
            DoesNotFitError: memory ran out.
        """
        found = self._models.attempt(lambda: self._loss_and_gradients(setting))
        if self._reference is None:
            self._reference = found
        return describe_difference(self._reference, found, self._dtype)

    def _loss_and_gradients(self, setting: Setting) -> tuple[float, dict[str, Tensor]]:
        """Of a short row, without dropout; the gradients on the host."""
        model, row = self._models[setting], self._rows.short()
        with without_dropout(model):
            loss = backward(model, row)
        trained = {**model.lora_parameters(), **model.projector_parameters()}
        gradients = {name: p.grad.detach().float().cpu() for name, p in trained.items() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return float(loss), gradients


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Training mode, so that what runs is what training runs, but nothing dropped."""
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    before = [module.p for module in dropouts]
    try:
        for module in dropouts:
            module.p = 0.0
        yield
    finally:
        for module, probability in zip(dropouts, before, strict=True):
            module.p = probability


def describe_difference(
    expected: tuple[float, dict[str, Tensor]], found: tuple[float, dict[str, Tensor]], dtype: torch.dtype
) -> str:
    """How a loss and its gradients differ beyond rounding; "" where they agree.

    Args:
        expected: loss, and gradients by parameter.
        found: the same of another implementation.
        dtype: what matrix products run in.
    """
    loss_tolerance, gradient_tolerance = TOLERANCE[dtype]
    if not abs(found[0] - expected[0]) <= loss_tolerance * abs(expected[0]):
        return f"the loss is {found[0]:.6g}, the start's {expected[0]:.6g}"
    if expected[1].keys() != found[1].keys():
        return "other parameters have gradients than at the start"
    off = math.sqrt(sum(float((found[1][name] - value).square().sum()) for name, value in expected[1].items()))
    norm = math.sqrt(sum(float(value.square().sum()) for value in expected[1].values()))
    if not off <= gradient_tolerance * norm:
        return f"the gradient differs from the start's by {off / norm:.1%}"
    return ""
