"""Every attention backend that is installed, on a real GPU: right, and the same bits every time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llara_dist.model.attention_backends import attend, obstacle
from llara_dist.model.packing import Backend, Packing
from tests.attention import packing, random_states, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LENGTHS = (230, 1, 150, 330, 9, 64, 65, 128, 301)
ENDS = (9, 1, 5, 12, 9, 1, 2, 30, 7)


def gradients(
    function: Callable[[Tensor, Tensor, Tensor, Packing], Tensor],
    states: tuple[Tensor, Tensor, Tensor],
    packed: Packing,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The result and the gradients of queries, keys and values, computed in `dtype`."""
    leaves = [state.to(dtype).requires_grad_() for state in states]
    found = function(leaves[0], leaves[1], leaves[2], packed)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found.backward(upstream.to(found))
    return [found.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("queries", [None, ENDS], ids=["all ask", "ends ask"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 8, 64), (8, 2, 128)])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("flash3", torch.bfloat16),
        ("flash2", torch.bfloat16),
        ("varlen", torch.bfloat16),
        ("sdpa", torch.bfloat16),
        ("sdpa", torch.float32),
    ],
)
def test_backend(
    backend: Backend, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, queries: tuple[int, ...] | None
) -> None:
    """At most twice as far from float64 as attention spelt out in the same dtype; and a second time the same bits."""
    device = torch.device("cuda")
    if reason := obstacle(backend, device, dtype, head_dim):
        pytest.skip(reason)
    packed = packing(backend, LENGTHS, queries, device)
    states = random_states(packed, heads, kv_heads, head_dim)
    ours, again = (gradients(attend, states, packed, dtype) for _ in range(2))
    eager, exact = (gradients(reference, states, packed, kind) for kind in (dtype, torch.float64))
    for name, found, repeated, plain, expected in zip("oqkv", ours, again, eager, exact, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, repeated), name
        error, allowed = ((value.double() - expected).norm() for value in (found, plain))
        assert float(error) <= 2 * float(allowed) + 1e-6 * float(expected.norm()), name
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
