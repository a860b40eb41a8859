"""Packed attention: every backend against attention spelt out in float64, and which one is chosen."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import varlen

from llara_dist.config import KernelsConfig
from llara_dist.errors import InputError
from llara_dist.model.attention import packed_attention
from llara_dist.model.attention_backends import attend
from llara_dist.model.attention_order import fixed_order, restore
from llara_dist.model.kernels import choose_kernels
from tests.attention import packing, random_states, reference, segments

ROWS = {
    "one sample": ((9,), None),
    "single tokens": ((1, 1, 1), None),
    "uneven": ((7, 1, 12, 3), None),
    "many": (tuple(1 + key * 7 % 23 for key in range(40)), None),
    "ends of samples": ((7, 1, 12, 3), (3, 1, 1, 3)),
    "ends of one sample": ((9,), (4,)),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("row", ROWS)
def test_sample_by_sample_equals_attention_spelt_out(row: str, kv_heads: int) -> None:
    keys, queries = ROWS[row]
    packed = packing("sdpa", keys, queries)
    states = random_states(packed, 4, kv_heads, 8)
    upstream = torch.randn_like(states[0])
    results = []
    for function in (functools.partial(attend, packing=packed), functools.partial(reference, packing=packed)):
        leaves = [state.clone().requires_grad_() for state in states]
        found = function(*leaves)
        found.backward(upstream)
        results.append([found, *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_transformers_interface(scaling: float | None) -> None:
    """Layout, scale, and one dtype for the kernel where the rotary embedding left float32."""
    packed = packing("sdpa", (5, 3))
    query, key, value = (state.float() for state in random_states(packed, 4, 2, 8))
    as_projected = [state.transpose(0, 1)[None] for state in (query, key, value.bfloat16())]
    found, weights = packed_attention(torch.nn.Module(), *as_projected, None, scaling=scaling, packing=packed)
    assert weights is None
    assert found.dtype == torch.bfloat16
    assert found.shape == (1, 8, 4, 8)
    expected = reference(query, key, value, packed, scaling)
    torch.testing.assert_close(found[0].float(), expected, rtol=2e-2, atol=2e-2)  # bfloat16 has 8 bits


class Stand:
    """Computes what a flash kernel would, and keeps how it was asked."""

    def __init__(self, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, Any] = {}
        self._module = module
        self._monkeypatch = monkeypatch

    def attend(self, states: list[Tensor], boundaries: list[Tensor], longest: list[int], scale: Any) -> Tensor:
        assert {state.dtype for state in states} == {torch.bfloat16}
        assert all(state.ndim == 3 and state.is_contiguous() for state in states)
        assert all(found.dtype == torch.int32 for found in boundaries)
        lengths = [tuple(found.diff().tolist()) for found in boundaries]
        assert longest == [max(found) for found in lengths]
        packed = packing("sdpa", lengths[1], lengths[0])
        self.asked["scale"] = scale
        return reference(*states, packed, scale)

    def install(self, function: Callable[..., Any], name: str) -> None:
        module = ModuleType(self._module)
        setattr(module, name, function)
        self._monkeypatch.setitem(sys.modules, self._module, module)


def flash2(stand: Stand) -> None:
    def flash_attn_varlen_func(  # as in flash-attn 2.8
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        assert causal
        assert deterministic
        assert (dropout_p, window_size, softcap, return_attn_probs) == (0.0, (-1, -1), 0.0, False)
        return stand.attend([q, k, v], [cu_seqlens_q, cu_seqlens_k], [max_seqlen_q, max_seqlen_k], softmax_scale)

    stand.install(flash_attn_varlen_func, "flash_attn_varlen_func")


def flash3(stand: Stand, with_lse: bool = False) -> None:
    def flash_attn_varlen_func(  # as in FlashAttention-3's interface
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        qv: Tensor | None = None,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        deterministic: bool = False,
        sm_margin: int = 0,
        return_attn_probs: bool = False,
    ) -> Any:
        assert causal
        assert deterministic
        assert seqused_q is seqused_k is qv is None
        found = stand.attend([q, k, v], [cu_seqlens_q, cu_seqlens_k], [max_seqlen_q, max_seqlen_k], softmax_scale)
        return (found, torch.empty(0)) if with_lse else found

    stand.install(flash_attn_varlen_func, "flash_attn_varlen_func")


def varlen_2_11(stand: Stand) -> None:
    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert window_size == (-1, 0)
        return stand.attend([query, key, value], [cu_seq_q, cu_seq_k], [max_q, max_k], scale)

    stand.install(varlen_attn, "varlen_attn")


INSTALLED = inspect.signature(varlen.varlen_attn)


def varlen_installed(stand: Stand) -> None:
    def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
        asked = INSTALLED.bind(*args, **kwargs).arguments
        assert asked["window_size"] == (-1, 0)
        assert asked.get("enable_gqa", True) == (asked["query"].shape[1] != asked["key"].shape[1])
        states = [asked[name] for name in ("query", "key", "value")]
        boundaries = [asked["cu_seq_q"], asked["cu_seq_k"]]
        return stand.attend(states, boundaries, [asked["max_q"], asked["max_k"]], asked["scale"])

    varlen_attn.__signature__ = INSTALLED  # pyright: ignore[reportFunctionMemberAccess]
    stand.install(varlen_attn, "varlen_attn")


@pytest.mark.parametrize(
    ("backend", "module", "put"),
    [
        ("flash2", "flash_attn", flash2),
        ("flash3", "flash_attn_interface", flash3),
        ("flash3", "flash_attn_interface", functools.partial(flash3, with_lse=True)),
        ("varlen", "torch.nn.attention.varlen", varlen_2_11),
        ("varlen", "torch.nn.attention.varlen", varlen_installed),
    ],
    ids=["flash2", "flash3", "flash3 with lse", "varlen of 2.11", "varlen as installed"],
)
@pytest.mark.parametrize(("kv_heads", "queries"), [(4, None), (2, (3, 1, 2))], ids=["all ask", "ends ask"])
def test_what_flash_kernels_are_asked(
    backend: Any, module: str, put: Any, kv_heads: int, queries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(module, monkeypatch)
    put(stand)
    packed = packing(backend, (5, 1, 6), queries)
    states = [state.bfloat16().requires_grad_() for state in random_states(packed, 4, kv_heads, 8)]
    as_projected = [state.transpose(0, 1)[None] for state in states]
    as_projected[0] = as_projected[0].float()  # as a float32 residual stream leaves queries
    found, _ = packed_attention(torch.nn.Module(), *as_projected, None, scaling=0.4, packing=packed)
    assert found.dtype == torch.bfloat16
    assert stand.asked == {"scale": 0.4}
    torch.testing.assert_close(found[0], reference(*states, packed, 0.4))
    found.sum().backward()
    assert all(state.grad is not None and bool(state.grad.any()) for state in states[:1] + states[2:])


class Raises(torch.autograd.Function):
    """An attention whose backward pass runs out of memory."""

    @staticmethod
    def forward(ctx: Any, query: Tensor) -> Tensor:
        return query.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")


def test_a_backward_pass_that_raises_leaves_the_settings_to_be_restored() -> None:
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    states = [torch.ones(1, requires_grad=True) for _ in range(3)]
    for _ in range(2):  # the second finds what the first left
        attended = fixed_order(lambda query, key, value: Raises.apply(query) + key + value, *states)  # pyright: ignore
        with pytest.raises(torch.OutOfMemoryError):
            attended.backward()
        assert torch.are_deterministic_algorithms_enabled()
    restore()
    assert (torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory) == before


def test_attention_alone_runs_backward_in_a_fixed_order() -> None:
    """Determinism is on while attention's gradients are computed, and as it was before and after."""
    seen: list[tuple[str, bool, bool]] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, states: Tensor, place: str) -> Tensor:
            ctx.place = place
            return states * 1.0

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            fill: Any = torch.utils.deterministic
            seen.append((ctx.place, torch.are_deterministic_algorithms_enabled(), fill.fill_uninitialized_memory))
            return gradients[0], None

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        inside: Any = Look.apply(query * key + value, "inside")
        return inside

    states = [torch.randn(3, requires_grad=True) for _ in range(3)]
    before: Any = [Look.apply(state, "before") for state in states]
    after: Any = Look.apply(fixed_order(attention, *before), "after")
    after.sum().backward()
    assert seen == [("after", False, True), ("inside", True, False), *[("before", False, True)] * 3]
    query, key, _ = states
    torch.testing.assert_close(query.grad, key.detach())
    torch.testing.assert_close(key.grad, query.detach())


def chosen(asked: str = "auto", dtype: torch.dtype = torch.bfloat16, **others: Any) -> tuple[str, str]:
    found = choose_kernels(KernelsConfig(attention=asked, layers="torch"), torch.device("cuda", 0), dtype, **others)  # pyright: ignore
    return found.attention, dict(found.reasons).get("attention", "")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend a GPU of some compute capability, and packages."""

    def pretend(capability: tuple[int, int], *packages: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        for name in ("flash_attn", "flash_attn_interface"):
            module = ModuleType(name)
            old = f"old {name}" in packages
            flash: Any = (lambda q, k, v: q) if old else (lambda q, k, v, deterministic=False: q)
            module.flash_attn_varlen_func = flash  # pyright: ignore[reportAttributeAccessIssue]
            monkeypatch.setitem(sys.modules, name, module if old or name in packages else None)

    return pretend


def test_the_fastest_that_is_there_is_chosen(gpu: Callable[..., None]) -> None:
    gpu((9, 0), "flash_attn", "flash_attn_interface")
    assert chosen() == ("flash3", "")
    assert chosen(head_dim=256) == ("flash2", "flash3: takes heads up to 128 wide, in eights, not 256")
    gpu((8, 0), "flash_attn", "flash_attn_interface")
    assert chosen() == ("flash2", "flash3: needs compute capability 9")
    gpu((9, 0), "old flash_attn")
    assert chosen()[0] == "varlen"
    assert "flash3: flash_attn_interface is not installed" in chosen()[1]
    assert "flash2: this version of flash_attn has no flash_attn_varlen_func that takes deterministic" in chosen()[1]
    assert chosen("sdpa") == ("sdpa", "")
    assert chosen(dtype=torch.float32) == ("sdpa", "needs bfloat16, not float32")
    assert chosen(model_attention="eager") == ("sdpa", "model.attention=eager")
    gpu((7, 5), "flash_attn")
    assert chosen() == ("sdpa", "needs compute capability 8.0")


def test_on_a_cpu_it_is_sdpa() -> None:
    found = choose_kernels(KernelsConfig(), torch.device("cpu"), torch.float32)
    assert str(found).startswith("attention sdpa (no GPU)")


@pytest.mark.parametrize("asked", ["flash3", "flash2", "varlen"])
def test_asked_for_by_name_but_impossible(asked: Any) -> None:
    with pytest.raises(InputError, match=rf"^kernels.attention={asked}: no GPU; use auto$"):
        choose_kernels(KernelsConfig(attention=asked), torch.device("cpu"), torch.float32)


def test_a_mask_of_any_sample_is_a_corner_of_one() -> None:
    packed = packing("sdpa", (4, 2, 6), (2, 2, 3))
    for rows, columns in zip((2, 2, 3), (4, 2, 6), strict=True):
        expected = F.pad(torch.ones(columns, columns, dtype=torch.bool).tril(), (0, 0, 0, 0))[columns - rows :]
        assert torch.equal(packed.mask[-rows:, -columns:], expected)
    assert segments((2, 3)).boundaries.tolist() == [0, 2, 5]
