"""Parameter counts are exact: against models on the meta device, PEFT's own count and the published totals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llara_dist.config import LoraConfig
from llara_dist.cost.architecture import PRESETS, Architecture
from llara_dist.cost.tuned import TunedModel
from llara_dist.errors import InputError
from llara_dist.model.llama import attach_lora
from llara_dist.model.projector import Projector

PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
}


def on_meta(architecture: Architecture) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=architecture.vocabulary,
        hidden_size=architecture.hidden,
        intermediate_size=architecture.intermediate,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        tie_word_embeddings=architecture.tied,
        attention_bias=architecture.attention_bias,
        mlp_bias=architecture.mlp_bias,
    )
    assert Architecture.of(config) == architecture
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    assert PRESETS[name].parameters == PUBLISHED[name]


@pytest.mark.parametrize(
    "architecture",
    [
        PRESETS["llama-2-7b"],
        Architecture(64, 176, 3, 4, 2, 16, 400, tied=True),
        Architecture(64, 176, 3, 4, 4, 24, 400, attention_bias=True, mlp_bias=True),
    ],
    ids=["7b", "tied, grouped", "biases, wide heads"],
)
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), LoraConfig().targets], ids=["q, v", "all"])
def test_counts_are_those_of_the_model_and_of_peft(architecture: Architecture, targets: tuple[str, ...]) -> None:
    model = on_meta(architecture)
    assert architecture.parameters == model.num_parameters()
    linears = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert architecture.linear_weights == sum(module.weight.numel() for module in linears)
    assert architecture.biases == sum(module.bias.numel() for module in linears if module.bias is not None)
    tuned = TunedModel(architecture, item_dim=64, rank=8, targets=targets, projector_hidden=architecture.hidden)
    with torch.device("meta"):
        adapted = attach_lora(model.requires_grad_(False), LoraConfig(targets=targets), model.name_or_path)
        projector = Projector(64, architecture.hidden)
    assert tuned.adapter_weights == adapted.get_nb_trainable_parameters()[0]
    assert tuned.projector_sizes == [value.numel() for value in projector.parameters()]
    assert tuned.trainable == tuned.adapter_weights + sum(value.numel() for value in projector.parameters())


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(InputError, match="'lm_head'; known are q_proj, k_proj"):
        PRESETS["llama-2-7b"].adapter_shapes(8, ("lm_head",))
