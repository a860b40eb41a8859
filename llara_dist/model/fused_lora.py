"""PEFT's LoRA layers with a forward pass of one op: fewer passes over the activations, and less kept of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from llara_dist.model.ops.lora import LEVELS, draw_seed, kept_levels, lora_down, lora_up


def fuse_lora(model: nn.Module) -> int:
    """Let every LoRA layer of a model compute as `ops/lora.py` does; returns how many there are.

    The modules stay PEFT's in all else: parameters and their names, saving and loading, merging. While adapters are
    disabled, merged or chosen by sample, PEFT's own forward pass runs.

    Raises:
        ValueError: a layer is not a linear layer with one plain adapter; names it and what it has.
    """
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        if found := _not_plain(layer):
            raise ValueError(f"{name} has {found}; only linear layers with one plain adapter are fused")
        layer.__class__ = _fused(type(layer))
    return len(layers)


def _not_plain(layer: Any) -> str:
    """What of a layer the fused forward pass does not know; empty where it knows all."""
    from peft.tuners.lora import Linear, Linear4bit

    if type(layer) not in (Linear, Linear4bit):
        return f"the type {type(layer).__name__}"
    if len(layer.lora_A) != 1:
        return f"{len(layer.lora_A)} adapters"
    (name,) = layer.lora_A
    if layer.lora_variant:
        return f"the variant {type(layer.lora_variant[name]).__name__}"
    if layer.lora_B[name].bias is not None:
        return "a bias on B"
    return "transposed weights" if layer.fan_in_fan_out else ""


@functools.cache
def _fused(kind: Any) -> type[nn.Module]:
    """PEFT's class with another forward pass."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = self.active_adapters
        if self.disable_adapters or self.merged or args or kwargs or len(self.lora_A) != 1 or len(active) != 1:
            return kind.forward(self, x, *args, **kwargs)
        (name,) = active
        dropout = self.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        kept = kept_levels(p)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x, h = lora_down(x, self.lora_A[name].weight, dtype, kept, draw_seed() if kept < LEVELS else None)
        return lora_up(self.base_layer(x), h, self.lora_B[name].weight, self.scaling[name] * LEVELS / kept)

    return type(f"Fused{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})
