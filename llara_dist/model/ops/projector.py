"""The projector as one op: item embeddings → behaviour embeddings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def project_reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """GELU(x·W1ᵀ + b1)·W2ᵀ + b2 in eager PyTorch; what every fused kernel is held against.

    Args:
        x: [U, d] item embeddings.
        w1: [m, d].
        b1: [m].
        w2: [h, m].
        b2: [h].

    Returns:
        [U, h], in the dtype that `x` and the weights promote to (autocast applies).
    """
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def project(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The public call of the op; shapes as in `project_reference`, differentiable in all arguments.

    Raises:
        ValueError: the shapes do not chain.
    """
    if x.shape[-1] != w1.shape[1] or w1.shape[0] != w2.shape[1] or b1.shape != w1.shape[:1] or b2.shape != w2.shape[:1]:
        shapes = [tuple(t.shape) for t in (x, w1, b1, w2, b2)]
        raise ValueError(f"projector shapes do not chain: x, w1, b1, w2, b2 = {shapes}")
    return project_reference(x, w1, b1, w2, b2)


def output_rms(x: Tensor) -> Tensor:
    """Root mean square over all elements, a float32 scalar."""
    return x.to(torch.float32).square().mean().sqrt()
