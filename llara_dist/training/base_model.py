"""The base model's files, looked at without reading a weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llara_dist.config import LoraConfig, ModelConfig, ProjectorConfig
from llara_dist.errors import InputError

if TYPE_CHECKING:
    from transformers import LlamaConfig

FLOATS = {"F32", "F16", "BF16"}
"""dtypes, as safetensors names them, that weights which are no quantised ones can have"""


def stored_quantisation(architecture: LlamaConfig) -> dict[str, Any] | None:
    """The quantization_config of a model whose weights were stored quantised, None for one that is not."""
    found: Any = getattr(architecture, "quantization_config", None)
    return found.to_dict() if hasattr(found, "to_dict") else found


def check_storage(config: ModelConfig, architecture: LlamaConfig) -> str:
    """Weights that were stored quantised are what the run asks for; returns how the weights will be held.

    Raises:
        InputError: stored in another way than `model.bits` and `model.quant_storage` say.
    """
    stored = stored_quantisation(architecture)
    held = f"NF4 packed in {config.quant_storage}" if config.bits == 4 else f"{config.bits} bits"
    if stored is None:
        return held
    where = f"{config.path}: config.json's quantization_config"
    if stored.get("quant_method") != "bitsandbytes" or stored.get("bnb_4bit_quant_type") != "nf4":
        method = stored.get("bnb_4bit_quant_type") or stored.get("quant_method")
        raise InputError(f"{where} says {method}, only bitsandbytes' nf4 is read; give the model without quantisation")
    if config.bits != 4:
        raise InputError(f"{where}: stored in 4 bits, model.bits={config.bits} does not fit; set model.bits=4")
    storage = str(stored.get("bnb_4bit_quant_storage", "uint8")).removeprefix("torch.")
    if storage != config.quant_storage:
        raise InputError(
            f"{where}: packed in {storage}, model.quant_storage={config.quant_storage} does not fit; DeepSpeed would "
            f"cast the packed bytes by value; set model.quant_storage={storage} or quantise the model again"
        )
    return f"{held}, as stored"


def check_weight_files(config: ModelConfig, architecture: LlamaConfig) -> str:
    """Every weight file is there and whole, which its header tells; returns what they hold, in words.

    Raises:
        InputError: a file is missing, cut short, no safetensors file, lacks a tensor that the index names, or holds
            dtypes that are not known.
    """
    from safetensors import SafetensorError, safe_open

    dtypes: dict[str, int] = {}
    files = weight_paths(config)
    for path, named in files.items():
        try:
            with safe_open(path, framework="np") as content:
                held = set(content.keys())
                for name in held:
                    header = content.get_slice(name)
                    dtype = str(header.get_dtype())
                    dtypes[dtype] = dtypes.get(dtype, 0) + math.prod(header.get_shape())
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: {path.stat().st_size} bytes, cut short ({error}); fetch it again") from None
        lacking = sorted(named - held)
        if lacking:
            raise InputError(f"{path}: lacks {lacking[0]}, which the index says it holds; fetch the model again")
    odd = sorted(dtypes.keys() - FLOATS)
    if odd and stored_quantisation(architecture) is None:
        raise InputError(
            f"model.path={config.path}: weights of dtype {odd[0]}; give the model in float32, bfloat16 or float16"
        )
    numbers = ", ".join(f"{count / 1e6:,.1f} M {dtype}" for dtype, count in sorted(dtypes.items()))
    return f"{len(files)} whole file{'s' if len(files) > 1 else ''}: {numbers}"


def weight_paths(config: ModelConfig) -> dict[Path, set[str]]:
    """Each weight file with the tensors that the index names in it, none where there is no index.

    Raises:
        InputError: one is missing; or the hub is needed and cannot be asked.
    """
    import json

    from transformers.utils.hub import cached_file, is_offline_mode

    def find(name: str) -> Path | None:
        try:
            found = cached_file(config.path, name, revision=config.revision)
        except OSError:
            return None
        return None if found is None else Path(found)

    index = find("model.safetensors.index.json")
    weight_map = {"": "model.safetensors"} if index is None else json.loads(index.read_text())["weight_map"]
    files: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        path = find(name)
        if path is None and is_offline_mode() and not Path(config.path).is_dir():
            raise InputError(
                f"model.path={config.path}: {name} is not in this node's hub cache and HF_HUB_OFFLINE is set; fetch it "
                "where there is a network, or unset HF_HUB_OFFLINE"
            )
        if path is None:
            raise InputError(f"model.path={config.path}: has no {name}; weights in other formats are not loaded")
        files.setdefault(path, set()).update({tensor} - {""})
    return files


def trainable_parameters(architecture: LlamaConfig, lora: LoraConfig, projector: ProjectorConfig, item_dim: int) -> int:
    """How many numbers LoRA and projector train; targets that no Llama has count nothing."""
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    head = architecture.head_dim or hidden // architecture.num_attention_heads
    queries, keys = architecture.num_attention_heads * head, (architecture.num_key_value_heads or 0) * head
    sides = {
        "q_proj": hidden + queries,
        "k_proj": hidden + keys,
        "v_proj": hidden + keys,
        "o_proj": hidden + queries,
        "gate_proj": hidden + inner,
        "up_proj": hidden + inner,
        "down_proj": hidden + inner,
    }
    adapters = architecture.num_hidden_layers * lora.rank * sum(sides.get(target, 0) for target in lora.targets)
    width = projector.hidden_dim or hidden
    return adapters + (item_dim + 1) * width + (width + 1) * hidden
