"""The projector's kernels on a GPU: against float64, bit for bit again, compiled, and in a whole model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llara_dist.config import LoraConfig
from llara_dist.model.ops.projector import write_behaviour, write_behaviour_
from tests import models
from tests.projector_cases import CASES, Case, Row, check, make_row, spread

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LARGE = {
    "7B": Case(8192, 600, 64, 4096, 4096, spread(900, 600)),
    "7B, few items": Case(8192, 17, 64, 4096, 4096, spread(900, 17)),
    "7B, one item": Case(8192, 1, 64, 4096, 4096, (0,) * 900),
}


def run(row: Row, compute: torch.dtype, in_place: bool) -> tuple[Tensor, ...]:
    """The op's row and gradients under autocast."""
    weights = [weight.clone().requires_grad_() for weight in row.weights]
    with torch.autocast("cuda", torch.bfloat16, enabled=compute == torch.bfloat16):
        write, embeddings = (
            (write_behaviour_, row.embeddings.clone()) if in_place else (write_behaviour, row.embeddings)
        )
        written = write(embeddings, *row.arguments[:4], *weights)
    return written.detach(), *torch.autograd.grad(written, weights, row.gradient)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", (CASES | LARGE).values(), ids=(CASES | LARGE).keys())
def test_as_close_to_float64_as_eager(case: Case, compute: torch.dtype, in_place: bool) -> None:
    check(case, compute, "cuda", lambda row: run(row, compute, in_place))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_same_bits_again(compute: torch.dtype) -> None:
    row = make_row(LARGE["7B"], compute, "cuda")
    first = run(row, compute, in_place=False)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(row, compute, in_place=True), strict=True))


def test_waits_for_nothing() -> None:
    row = make_row(CASES["few items"], torch.bfloat16, "cuda")
    run(row, torch.bfloat16, in_place=True)  # compiles, loads, makes cuBLAS' handle
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(row, torch.bfloat16, in_place=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_whole() -> None:
    row = make_row(CASES["few items"], torch.float32, "cuda")
    leaves = [row.embeddings.clone().requires_grad_(), *(weight.clone().requires_grad_() for weight in row.weights)]

    def write(embeddings: Tensor, *weights: Tensor) -> Tensor:
        return 2 * write_behaviour(embeddings, *row.arguments[:4], *weights)

    expected = torch.autograd.grad(write(*leaves), leaves, row.gradient)
    found = torch.autograd.grad(torch.compile(write, fullgraph=True)(*leaves), leaves, row.gradient)
    for mine, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(
        torch.ops.llara_dist.write_behaviour.default,
        (leaves[0], *row.arguments[:4], *leaves[1:], torch.float32),
        rtol=1e-5,
        atol=1e-5,
    )


def test_model_with_the_op_equals_the_eager_one(tmp_path: Path) -> None:
    models.write_shape(tmp_path, num_hidden_layers=2)
    model = models.build(tmp_path, {"bits": 32}, LoraConfig(dropout=0.0)).to("cuda")
    batch, found = models.packed_row().to("cuda"), {}
    for projector in ("eager", "triton"):
        model.kernels = dataclasses.replace(model.kernels, projector=projector)
        model.zero_grad()
        loss = model(batch)
        loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found[projector] = {"loss": loss.detach(), **trained}
    torch.testing.assert_close(found["triton"], found["eager"], rtol=1e-3, atol=1e-4)
