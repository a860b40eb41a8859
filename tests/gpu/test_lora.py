"""LoRA's kernels on a real GPU: their mask, their sums, and whole layers beside PEFT's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llara_dist.model.fused_lora import fuse_lora
from llara_dist.model.ops.lora import kept_levels, masked_down, masked_down_backward
from tests.lora_cases import SCALE, peft_linear, reference_mask, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SEED = torch.tensor(0x1234_5678_9ABC_DEF0)
KEPT = kept_levels(0.3)
SHAPES = [(9, 48, 8), (341, 1000, 8), (4231, 4096, 8), (70, 11008, 64), (513, 136, 128)]


def operands(tokens: int, inputs: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, dx, a, dh and, in float64, the mask."""
    torch.manual_seed(tokens)
    shapes = ((tokens, inputs), (tokens, inputs), (rank, inputs), (tokens, rank))
    x, dx, a, dh = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    mask = reference_mask(int(SEED), tokens, inputs, KEPT).to("cuda", torch.float64)
    return x, dx, a, dh, mask


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_compute_their_mask_times_x(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """At most twice as far from float64 as the product in this dtype with the same mask."""
    x, dx, a, dh, mask = operands(*shape, dtype)
    dropped = x * mask.to(dtype)
    plain = [dropped @ a.t(), dx + (dh @ a) * mask.to(dtype), (dh.t() @ dropped).float()]
    wide = dropped.double()
    exact = [
        wide @ a.double().t(),
        dx.double() + mask * (dh.double() @ a.double()),
        dh.double().t() @ wide,
    ]
    found = [masked_down(x, a, SEED, KEPT), *masked_down_backward(dx, dh, x, a, SEED, KEPT)]
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32]
    for ours, theirs, true in zip(found, plain, exact, strict=True):
        # cuBLAS may split a float32 sum of 11,008 terms into many; the kernels add them one after another.
        assert relative_error(ours, true) <= 2 * relative_error(theirs, true) + 3e-6


def test_sums_have_a_fixed_order() -> None:
    x, dx, a, dh, _ = operands(4231, 4096, 8, torch.bfloat16)
    first = masked_down_backward(dx, dh, x, a, SEED, KEPT)
    for _ in range(5):
        again = masked_down_backward(dx, dh, x, a, SEED, KEPT)
        assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))


def layer(bits: int, dropout: float) -> Any:
    import bitsandbytes

    torch.manual_seed(0)
    base: Any = nn.Linear(512, 384, bias=False, dtype=torch.bfloat16)
    if bits == 4:
        whole = base
        base = bitsandbytes.nn.Linear4bit(512, 384, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        base.load_state_dict(whole.state_dict())
    return peft_linear(base.to("cuda"), dropout, bits).to("cuda").train()


def run(adapted: Any, values: Tensor, gradient: Tensor) -> list[Tensor]:
    x = values.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = adapted["linear"](x)
    weights = [adapted["linear"].lora_A["default"].weight, adapted["linear"].lora_B["default"].weight]
    return [y.detach(), *torch.autograd.grad(y, [x, *weights], gradient)]


@pytest.mark.parametrize("bits", [4, 16])
def test_a_layer_is_as_exact_as_pefts(bits: int) -> None:
    adapted = layer(bits, dropout=0.0)
    values = torch.randn(1, 1000, 512, device="cuda", dtype=torch.bfloat16)
    gradient = torch.randn(1, 1000, 384, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        weight = adapted["linear"].base_layer(torch.eye(512, device="cuda", dtype=torch.bfloat16)).t().double()
    plain = run(adapted, values, gradient)
    fuse_lora(adapted)
    fused = run(adapted, values, gradient)
    a, b = adapted["linear"].lora_A["default"].weight, adapted["linear"].lora_B["default"].weight
    wide = [t.detach().double().requires_grad_() for t in (values, a, b)]
    y = wide[0] @ weight.t() + SCALE * (wide[0] @ wide[1].t() @ wide[2].t())
    exact = [y.detach(), *torch.autograd.grad(y, wide, gradient.double())]
    for ours, theirs, true in zip(fused, plain, exact, strict=True):
        assert relative_error(ours, true) <= 2 * relative_error(theirs, true)


def test_dropout_repeats_from_its_seed_and_never_waits_for_the_device() -> None:
    adapted = layer(4, dropout=0.1)
    fuse_lora(adapted)
    values = torch.randn(1, 1000, 512, device="cuda", dtype=torch.bfloat16)
    gradient = torch.randn(1, 1000, 384, device="cuda", dtype=torch.bfloat16)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        torch.cuda.synchronize()
        # Compiled by the first round; what bitsandbytes does once lies there as well.
        torch.cuda.set_sync_debug_mode("error" if found else "default")
        try:
            found.append(run(adapted, values, gradient))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(left, right) for left, right in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0])
