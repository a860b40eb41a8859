"""How the decoder layers of one model compute: Liger's fused kernels, torch.compile.

Liger's own `apply_liger_kernel_to_llama` replaces names in transformers' module, for every Llama of the process. Here
only the given model changes: its norms and MLPs get forward passes of their own, and its attention layers run the
forward pass of the installed transformers with another `apply_rotary_pos_emb`. No parameter is renamed, and what PEFT
wraps, quantised linear layers included, stays as it is.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llara_dist.model.kernels import Kernels

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROTARY = "apply_rotary_pos_emb"
"""the global of transformers' modeling_llama that attention rotates queries and keys with"""


def arrange_layers(model: LlamaForCausalLM, kernels: Kernels) -> None:
    """Let a model's layers compute as chosen.

    Args:
        model: with adapters attached.
        kernels: what `choose_kernels` returned.
    """
    if kernels.layers == "liger":
        use_liger(model)
    if kernels.compile:
        compile_layers(model)


def use_liger(model: LlamaForCausalLM) -> None:
    """Let RMSNorm, rotary embedding and SwiGLU of one model run in Liger's kernels, forward and backward.

    A layer whose forward pass was replaced before keeps that one.

    Args:
        model: with or without adapters attached.
    """
    loaded: Any = model
    norms = [loaded.model.norm]
    for layer in loaded.model.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        _replace(layer.mlp, _swiglu)
        _replace(layer.self_attn, _with_global(type(layer.self_attn).forward, ROTARY, _rotate))
    for norm in norms:
        _replace(norm, _rms_norm)


def compile_layers(model: LlamaForCausalLM, backend: str = "inductor") -> None:
    """Let torch.compile compile decoder layers, for any number of tokens; it does so at the first pass.

    Layers of a kind (recomputed, kept, the last) share their graphs. Attention is left out of them.

    Args:
        model: with adapters attached, and everything else that replaces a forward pass in place.
        backend: of torch.compile; `aot_eager` traces as any does and generates no code.
    """
    loaded: Any = model
    for layer in loaded.model.layers:
        layer.compile(dynamic=True, backend=backend)


def _replace(module: nn.Module, forward: Any) -> None:
    if "forward" not in vars(module):
        module.forward = types.MethodType(forward, module)


def _rms_norm(norm: Any, hidden_states: Tensor) -> Tensor:
    from liger_kernel.ops import LigerRMSNormFunction

    # "llama": the root mean square in float32, the weight in the input's type, as transformers does. Not in place: the
    # gradient that comes in may be shared with the residual stream.
    return LigerRMSNormFunction.apply(hidden_states, norm.weight, norm.variance_epsilon, 0.0, "llama", False)


def _swiglu(mlp: Any, x: Tensor) -> Tensor:
    from liger_kernel.ops import LigerSiLUMulFunction

    return mlp.down_proj(LigerSiLUMulFunction.apply(mlp.gate_proj(x), mlp.up_proj(x)))


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops import LigerRopeFunction

    return LigerRopeFunction.apply(query, key, cos, sin)


def _with_global(function: Any, name: str, value: Any) -> Any:
    """The same function with another value for one of the globals that it names; the module keeps its own."""
    if name not in function.__code__.co_names:
        raise AttributeError(f"{function.__qualname__} does not use {name}: this transformers is not supported")
    names = {**function.__globals__, name: value}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
