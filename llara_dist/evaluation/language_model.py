"""The language model inside a HybridLlama as generation and scoring call it: states first, the head where asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llara_dist.model.hybrid import HybridLlama


def causal_model(model: HybridLlama) -> Any:
    """The LlamaForCausalLM itself, adapters active inside its layers; under PEFT's wrapper or bare."""
    llm: Any = model.llm
    return llm.get_base_model() if hasattr(llm, "get_base_model") else llm


def token_embeddings(model: HybridLlama, tokens: Tensor) -> Tensor:
    """The model's own embeddings of token ids, [...] → [..., h]."""
    return causal_model(model).get_input_embeddings()(tokens)


def hidden_states(model: HybridLlama, embeddings: Tensor, **arguments: Any) -> tuple[Tensor, Any]:
    """Run the decoder layers.

    Args:
        model: in evaluation mode.
        embeddings: [N, L, h].
        arguments: attention_mask, position_ids, use_cache, past_key_values as transformers takes them.

    Returns:
        Final hidden states [N, L, h] and the key-value cache (None without use_cache).
    """
    with _precision(model, embeddings):
        output = causal_model(model).model(inputs_embeds=embeddings, **arguments)
    return output.last_hidden_state, output.past_key_values


def vocabulary_logits(model: HybridLlama, hidden: Tensor) -> Tensor:
    """The head: [M, h] → fp32 logits [M, vocabulary]."""
    head: nn.Module = causal_model(model).lm_head
    with _precision(model, hidden):
        return head(hidden).float()


def _precision(model: HybridLlama, tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, model.dtype, enabled=model.dtype != torch.float32)
