"""Run LoRA's Triton kernels in Triton's interpreter, for a process of its own: `python -m tests.interpreted_lora`.

Triton decides at its import whether functions are interpreted, so TRITON_INTERPRET=1 must be set before.
"""

from __future__ import annotations

import torch

from llara_dist.model.ops import lora_triton
from tests.lora_cases import reference_mask

SEED, KEPT = 0x1234_5678_9ABC_DEF0, 45_000
SHAPES = ((9, 41, 8), (41, 341, 3), (70, 64, 20), (300, 24, 16))
"""rows, columns, rank: none a whole number of tiles in every direction; the last in several parts"""


def main() -> None:
    """Compare both kernels with float64 on every shape."""
    for tokens, inputs, rank in SHAPES:
        torch.manual_seed(tokens)
        x, dx = torch.randn(tokens, inputs), torch.randn(tokens, inputs)
        a, dh = torch.randn(rank, inputs), torch.randn(tokens, rank)
        mask = reference_mask(SEED, tokens, inputs, KEPT).double()
        kept = x.double() * mask
        h = lora_triton.masked_down(x, a, SEED, KEPT)
        torch.testing.assert_close(h.double(), kept @ a.double().t(), rtol=1e-5, atol=1e-4)
        found, da = lora_triton.masked_down_backward(dx, dh, x, a, SEED, KEPT)
        torch.testing.assert_close(
            found.double(), dx.double() + mask * (dh.double() @ a.double()), rtol=1e-5, atol=1e-4
        )
        torch.testing.assert_close(da.double(), dh.double().t() @ kept, rtol=1e-5, atol=1e-3)
        # Products in a narrower type than the stream has (float16: the interpreter has no bfloat16 products).
        narrow, low = a.half(), lora_triton.masked_down(x, a.half(), SEED, KEPT)
        assert low.dtype == torch.float16
        exact = (x.half().double() * mask) @ narrow.double().t()
        torch.testing.assert_close(low.double(), exact, rtol=1e-3, atol=1e-2)
        found, da = lora_triton.masked_down_backward(dx, dh.half(), x, narrow, SEED, KEPT)
        assert (found.dtype, da.dtype) == (torch.float32, torch.float32)
        exact = dx.double() + mask * (dh.half().double() @ narrow.double())
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)


if __name__ == "__main__":
    main()
