"""Random Llamas of a wanted shape, built into whole HybridLlamas, for tests that measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from llara_dist.config import KernelsConfig, LoraConfig, ModelConfig, ProjectorConfig, RunConfig
from llara_dist.cost.architecture import Architecture
from llara_dist.cost.tuned import TunedModel
from llara_dist.model.hybrid import FASTEST, HybridLlama, build_hybrid_llama
from llara_dist.stream.batch import Batch, collate
from tests.tiny import make_sample

SHAPE = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
ITEMS, ITEM_DIM = 50, 16


def write_shape(folder: Path, **changes: Any) -> None:
    """Save a random Llama of `SHAPE` with changes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).save_pretrained(folder)


def build(folder: Path, model: dict[str, Any], lora: LoraConfig, kernels: KernelsConfig = FASTEST) -> HybridLlama:
    """The HybridLlama of a folder that `write_shape` made, in training mode, on the CPU."""
    table = torch.randn(ITEMS, ITEM_DIM, generator=torch.Generator().manual_seed(0))
    config = ModelConfig(path=str(folder), **model)
    return build_hybrid_llama(
        config, lora, ProjectorConfig(), table, torch.device("cpu"), seed=0, kernels=kernels
    ).train()


def packed_row(samples: int = 12) -> Batch:
    """A packed row of random hybrid samples."""
    return collate([make_sample(key, num_items=ITEMS) for key in range(samples)], [True] * samples)


def tuned(folder: Path, model: dict[str, Any], lora: LoraConfig, kernels: KernelsConfig = FASTEST) -> TunedModel:
    """What the cost model says of what `build` makes."""
    from transformers import LlamaConfig

    run = RunConfig(model=ModelConfig(path=str(folder), **model), lora=lora, kernels=kernels)
    architecture = Architecture.of(LlamaConfig.from_pretrained(folder))
    return TunedModel.of(run, architecture, (ITEMS, ITEM_DIM), model.get("compute_dtype") == "bfloat16")


def saved_bytes(model: HybridLlama, batch: Batch) -> int:
    """Bytes of the storages that a forward pass saves, those of parameters and buffers not counted."""
    known = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (pointer := tensor.untyped_storage().data_ptr()) not in known:
            kept.setdefault(pointer, tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    return found
