"""Liger's kernels and compiled layers on a GPU, where they are meant to run; compiled ones with fused adapters too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llara_dist.config import KernelsConfig, LoraConfig, ModelConfig, ProjectorConfig
from llara_dist.model.hybrid import build_hybrid_llama
from llara_dist.training.engine import seed_dropout
from tests.models import ITEM_DIM, ITEMS, packed_row, write_shape

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shape")
    write_shape(path)
    return path


def gradients(
    folder: Path, dtype: str, recompute: int, kernels: KernelsConfig, dropout: float = 0.0, seed: int = 0
) -> list[torch.Tensor]:
    """Losses of three rows and the sums of their gradients."""
    table = torch.randn(ITEMS, ITEM_DIM, generator=torch.Generator().manual_seed(0))
    model = ModelConfig(path=str(folder), compute_dtype=dtype, activation_checkpointing=recompute)  # pyright: ignore
    lora = LoraConfig(dropout=dropout)
    built = build_hybrid_llama(model, lora, ProjectorConfig(), table, torch.device("cuda"), seed=0, kernels=kernels)
    for name, parameter in built.lora_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator("cuda").manual_seed(1))
    built.train()
    found: list[torch.Tensor] = []
    # The graphs of other models count towards a limit beyond which layers run uncompiled, and nothing would be tested.
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for samples in (3, 7, 5):
            seed_dropout(seed, 0, 0, samples)
            loss = built(packed_row(samples).to("cuda"))
            loss.backward()
            found.append(loss.detach().double())
    return found + [p.grad.double() for p in built.parameters() if p.grad is not None]


def furthest(values: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(values, exact, strict=True))


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize(
    "fast",
    [
        {"layers": "liger"},
        {"compile": True},
        {"layers": "liger", "compile": True},
        {"compile": True, "lora": "fused"},
    ],
    ids="+".join,
)
def test_fast_layers_round_no_worse_than_plain_ones(folder: Path, fast: dict[str, object], recompute: int) -> None:
    """In bfloat16 they may be at most twice as far from float32 as transformers' own layers are.

    Without dropout: compiled layers draw its numbers in another order.
    """
    if "layers" in fast:
        pytest.importorskip("liger_kernel")
    others = {"attention": "sdpa", "projector": "eager", "lora": "peft"}
    plain = KernelsConfig(**{**others, "layers": "torch"})  # pyright: ignore
    fused = KernelsConfig(**{**others, "layers": "torch", **fast})  # pyright: ignore
    exact = gradients(folder, "float32", 0, plain)
    assert furthest(gradients(folder, "float32", recompute, fused), exact) < 1e-4
    allowed = 2 * furthest(gradients(folder, "bfloat16", recompute, plain), exact)
    assert furthest(gradients(folder, "bfloat16", recompute, fused), exact) < allowed


def test_compiled_fused_adapters_drop_by_their_seed_alone(folder: Path) -> None:
    """Recomputed or not, a compiled layer drops the same inputs; with another seed it drops others."""
    kernels = KernelsConfig(attention="sdpa", projector="eager", layers="torch", lora="fused", compile=True)
    kept = gradients(folder, "float32", 0, kernels, dropout=0.3)
    assert furthest(gradients(folder, "float32", 3, kernels, dropout=0.3), kept) < 1e-4
    assert furthest(gradients(folder, "float32", 0, kernels, dropout=0.3, seed=1), kept) > 1e-2
