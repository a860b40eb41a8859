"""The fused adapters: the same numbers as PEFT's, and dropout that is sound and repeats exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from llara_dist.config import KernelsConfig, LoraConfig, ModelConfig, ProjectorConfig
from llara_dist.errors import InputError
from llara_dist.model.fused_lora import fuse_lora
from llara_dist.model.hybrid import HybridLlama, build_hybrid_llama
from llara_dist.model.kernels import choose_kernels
from llara_dist.model.ops.lora import LEVELS, draw_seed, dropout_mask, kept_levels, lora_down, lora_up
from tests.lora_cases import SCALE, peft_linear, relative_error
from tests.models import build, packed_row, write_shape

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shape")
    write_shape(path, num_hidden_layers=2)
    return path


def hybrid(folder: Path, kind: Literal["fused", "peft"], dropout: float, **model: Any) -> HybridLlama:
    """A HybridLlama whose B matrices are not zero."""
    built = build(folder, {"bits": 4, **model}, LoraConfig(dropout=dropout), KernelsConfig(lora=kind))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in built.lora_parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.05, generator=generator)
    return built


def step(model: HybridLlama, seed: int = 0) -> dict[str, Tensor]:
    """The loss of a packed row and all gradients."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = model(packed_row(4))
    loss.backward()
    parameters = model.lora_parameters() | model.projector_parameters()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [9, 41, 341])
def test_one_layer_is_as_exact_as_pefts(tokens: int, dtype: torch.dtype) -> None:
    """Result and gradients against float64: at most twice PEFT's own error, and what float32 sums leave."""
    torch.manual_seed(tokens)
    adapted: Any = peft_linear(nn.Linear(88, 40, bias=False, dtype=dtype))
    a, b = adapted["linear"].lora_A["default"].weight, adapted["linear"].lora_B["default"].weight
    values, gradient = torch.randn(1, tokens, 88).to(dtype), torch.randn(1, tokens, 40).to(dtype)

    def run() -> list[Tensor]:
        x = values.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = adapted["linear"](x)
        found = torch.autograd.grad(y, [x, a, b], gradient)
        assert [t.dtype for t in (y, *found)] == [dtype, dtype, torch.float32, torch.float32]
        return [y.detach(), *found]

    plain = run()
    assert fuse_lora(adapted) == 1
    fused = run()
    wide = [t.detach().double().requires_grad_() for t in (values, a, b)]
    y = wide[0] @ adapted["linear"].base_layer.weight.double().t() + SCALE * (wide[0] @ wide[1].t() @ wide[2].t())
    exact = [y.detach(), *torch.autograd.grad(y, wide, gradient.double())]
    for ours, theirs, true in zip(fused, plain, exact, strict=True):
        assert relative_error(ours, true) <= 2 * relative_error(theirs, true) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("tokens", [9, 341])
def test_a_layer_in_training_is_the_formula_with_its_mask(tokens: int) -> None:
    """Result and gradients against float64, the mask drawn again from the seed that the layer draws."""
    torch.manual_seed(tokens)
    adapted: Any = peft_linear(nn.Linear(24, 16, bias=False), dropout=0.3).train()
    fuse_lora(adapted)
    layer = adapted["linear"]
    leaves = [
        torch.randn(tokens, 24, requires_grad=True),
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
    ]
    gradient = torch.randn(tokens, 16)
    torch.manual_seed(1)
    y = layer(leaves[0])
    found = torch.autograd.grad(y, leaves, gradient)
    torch.manual_seed(1)
    kept = kept_levels(0.3)
    mask = dropout_mask(draw_seed(), tokens, 24, kept, torch.float64)
    assert 0 < mask.mean() < 1
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dropped = wide[0] * mask * (LEVELS / kept)
    exact = wide[0] @ layer.base_layer.weight.double().t() + SCALE * (dropped @ wide[1].t() @ wide[2].t())
    for ours, true in zip((y, *found), (exact, *torch.autograd.grad(exact, wide, gradient.double())), strict=True):
        assert relative_error(ours, true) < 1e-6


def test_autocast_says_what_the_products_of_a_float32_input_are_computed_in() -> None:
    torch.manual_seed(0)
    adapted: Any = peft_linear(nn.Linear(24, 16, bias=False))
    fuse_lora(adapted)
    layer = adapted["linear"]
    leaves = [torch.randn(5, 24, requires_grad=True), layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    gradient, saved = torch.randn(5, 16), list[Tensor]()
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor),
    ):
        y = layer(leaves[0])
    found = torch.autograd.grad(y, leaves, gradient.bfloat16())
    assert [tensor.dtype for tensor in saved if tensor.shape == (5, 8)] == [torch.bfloat16]  # h
    assert [tensor.dtype for tensor in (y, *found)] == [torch.bfloat16] + 3 * [torch.float32]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = wide[0] @ layer.base_layer.weight.double().t() + SCALE * (wide[0] @ wide[1].t() @ wide[2].t())
    for ours, true in zip((y, *found), (exact, *torch.autograd.grad(exact, wide, gradient.double())), strict=True):
        assert relative_error(ours, true) < 2**-6


def test_masks_keep_as_many_as_told_and_know_nothing_of_each_other() -> None:
    kept, size = kept_levels(0.1), (1000, 1000)
    q = kept / LEVELS
    assert q == pytest.approx(0.9, abs=2**-17)
    masks = [dropout_mask(torch.tensor(seed), *size, kept, torch.float64) for seed in (2**32, 2**32 + 1)]
    standard = [(mask - q) / (q * (1 - q)) ** 0.5 for mask in masks]
    products = [*standard, standard[0] * standard[1], standard[0][1:] * standard[0][:-1]]
    for values in [*products, standard[0][:, 1:] * standard[0][:, :-1]]:
        assert abs(float(values.sum() / values.numel() ** 0.5)) < 5  # standard deviations
    assert set(masks[0].unique().tolist()) == {0.0, 1.0}
    assert kept_levels(0.0) == LEVELS
    assert kept_levels(1 - 1e-9) == 1


@pytest.mark.parametrize("model", [{}, {"activation_checkpointing": True}], ids=["kept", "recomputed"])
def test_a_model_without_dropout_computes_what_it_does_with_peft(folder: Path, model: dict[str, Any]) -> None:
    plain, fused = (step(hybrid(folder, kind, 0.0, **model)) for kind in ("peft", "fused"))
    assert plain.keys() == fused.keys()
    for name, value in plain.items():
        assert relative_error(fused[name], value) < 1e-5, name


def test_dropout_repeats_from_its_seed_recomputed_or_not(folder: Path) -> None:
    model = hybrid(folder, "fused", 0.1)
    first = step(model)
    for again in (step(model), step(hybrid(folder, "fused", 0.1, activation_checkpointing=True))):
        assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not torch.equal(step(model, seed=1)["loss"], first["loss"])


def test_evaluation_drops_nothing_and_disabled_adapters_are_the_base(folder: Path) -> None:
    batch = packed_row(3)
    logits = {}
    for kind in ("peft", "fused"):
        model = hybrid(folder, kind, 0.1).eval()
        with torch.no_grad():
            logits[kind] = model.answer_logits(batch)
            with model.llm.disable_adapter():
                logits[kind, "disabled"] = model.answer_logits(batch)
    assert relative_error(logits["fused"], logits["peft"]) < 1e-5
    assert torch.equal(logits["fused", "disabled"], logits["peft", "disabled"])
    assert relative_error(logits["peft", "disabled"], logits["peft"]) > 1e-3


def test_adapters_keep_pefts_names_and_merge_as_pefts() -> None:
    torch.manual_seed(0)
    adapted: Any = peft_linear(nn.Linear(12, 6, bias=False))
    names = list(adapted.state_dict())
    fuse_lora(adapted)
    assert list(adapted.state_dict()) == names
    x = torch.randn(3, 12)
    expected = adapted["linear"](x)
    adapted["linear"].merge()
    torch.testing.assert_close(adapted["linear"](x), expected)
    torch.testing.assert_close(adapted["linear"].base_layer(x), expected)


@pytest.mark.parametrize(
    ("settings", "reason"), [({"use_dora": True}, "variant"), ({"lora_bias": True}, "a bias on B")]
)
def test_adapters_of_another_kind_are_refused_with_what_they_have(settings: dict[str, Any], reason: str) -> None:
    base = nn.Linear(12, 6, bias=True)
    with pytest.raises(ValueError, match=f"linear has .*{reason}"):
        fuse_lora(peft_linear(base, **settings))


def test_wrong_shapes_and_a_missing_seed_are_refused() -> None:
    x, a, b = torch.zeros(4, 8), torch.zeros(2, 8), torch.zeros(6, 2)
    with pytest.raises(ValueError, match=r"x \(4, 7\), A \(2, 8\)"):
        lora_down(x[:, :7], a, torch.float32)
    with pytest.raises(ValueError, match="needs a seed"):
        lora_down(x, a, torch.float32, kept=5)
    with pytest.raises(ValueError, match="do not chain"):
        lora_up(torch.zeros(4, 5), torch.zeros(4, 2), b, 1.0)


def test_parameters_that_are_gathered_in_pefts_calls_stay_with_peft(folder: Path) -> None:
    auto = choose_kernels(KernelsConfig(), CPU, torch.float32, zero_stage=3)
    assert auto.lora == "peft"
    assert "lora peft (ZeRO-3" in str(auto)
    assert choose_kernels(KernelsConfig(), CPU, torch.float32, zero_stage=2).lora == "fused"
    # What is left for DeepSpeed to place is partitioned.
    table = torch.zeros(4, 8)
    model = ModelConfig(path=str(folder))
    built = build_hybrid_llama(model, LoraConfig(), ProjectorConfig(), table, CPU, seed=0, place=False)
    assert built.kernels.lora == "peft"
    assert not any("Fused" in type(module).__name__ for module in built.modules())
    with pytest.raises(InputError, match=r"^kernels\.lora=fused: ZeRO-3 .*; use auto$"):
        choose_kernels(KernelsConfig(lora="fused"), CPU, torch.float32, zero_stage=3)


def test_the_draw_is_an_op_that_graphs_can_hold() -> None:
    torch.library.opcheck(dropout_mask, (torch.tensor(2**32), 5, 7, 40_000, torch.float32))
    torch.manual_seed(0)
    adapted: Any = peft_linear(nn.Linear(24, 16, bias=False), dropout=0.3).train()
    fuse_lora(adapted)
    x, found = torch.randn(2, 5, 24, requires_grad=True), []
    compiled = torch.compile(lambda x: adapted["linear"](x * 1.0).square().sum(), backend="aot_eager", fullgraph=True)
    for run in (compiled, lambda x: adapted["linear"](x * 1.0).square().sum(), compiled):
        torch.manual_seed(1)
        loss = run(x)
        found.append([loss, *torch.autograd.grad(loss, [x, *adapted["linear"].lora_A.parameters()])])
    for again in found[1:]:
        assert all(torch.equal(left, right) for left, right in zip(again, found[0], strict=True))
    assert not torch.equal(compiled(x), found[0][0])  # drawn anew, not when it was traced


@pytest.mark.long
def test_kernels_in_the_interpreter_compute_their_mask_times_x() -> None:
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("Triton's interpreter before 3.9 fails on NumPy 2.4")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.interpreted_lora"]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus_and_stay_in_registers(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llara_dist.model.ops import lora_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = lora_triton.tile(8, torch.bfloat16)
    options = {"num_warps": constants.pop("num_warps")}
    scalars = {"seed": "i64"}
    for kernel in (lora_triton.down_kernel, lora_triton.down_backward_kernel):
        pointers = {"x", "a", "h", "dx", "dh", "out"}
        signature = {
            name: "constexpr"
            if name in constants
            else "*bf16"
            if name in pointers
            else "*fp32"
            if name == "parts"
            else scalars.get(name, "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constexprs=constants)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
        assert " STACK:0 " in usage, usage  # nothing spilled
        assert " LOCAL:0 " in usage, usage
