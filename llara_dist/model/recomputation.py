"""Activation checkpointing of some layers: what they compute is computed again in the backward pass, and not kept.

Non-reentrant checkpointing (`torch.utils.checkpoint`), which needs no input that requires a gradient and gives dropout
the random numbers of the first pass again. The first layers are those that are recomputed: their backward pass comes
last, when the activations of all others are gone, so the one layer that is whole again never adds to the peak.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from llara_dist.errors import InputError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def recomputed_layers(setting: bool | int | Literal["auto"], layers: int) -> int:
    """How many layers `model.activation_checkpointing` names.

    Args:
        setting: true = all, false = none, a number = so many; auto counts as all until it is decided.
        layers: of the model.

    Raises:
        InputError: more than there are.
    """
    if setting == "auto" or setting is True:
        return layers
    if setting > layers:
        raise InputError(
            f"model.activation_checkpointing={setting}: the model has {layers} layers; give at most that, or true"
        )
    return int(setting)


def recompute_layers(model: LlamaForCausalLM, count: int) -> None:
    """Let the first layers of a model be recomputed in training.

    Args:
        model: that no adapter is attached to yet; PEFT looks at these marks.
        count: layers, from the first; 0 changes nothing.
    """
    if count == 0:
        return
    loaded: Any = model
    enable = getattr(loaded, "activation_checkpointing_enable", loaded.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for layer in loaded.model.layers[count:]:
        layer.gradient_checkpointing = False
