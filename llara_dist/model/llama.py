"""Load a (4-bit) Llama and attach LoRA."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llara_dist.config import LoraConfig, ModelConfig
from llara_dist.errors import InputError
from llara_dist.model import attention, nf4
from llara_dist.model.four_bit import load_four_bit
from llara_dist.model.recomputation import recompute_layers, recomputed_layers
from llara_dist.model.weight_files import model_file, weight_file_names

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM


def compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """What matrix products run in: as told, or bfloat16 where the device has it in hardware, else float32.

    Raises:
        InputError: bfloat16 is asked for on a GPU without it.
    """
    if config.bits == 32 and config.compute_dtype == "auto":
        return torch.float32
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if config.compute_dtype == "auto":
        return torch.bfloat16 if has_bf16 or config.bits == 16 else torch.float32
    if config.compute_dtype == "bfloat16" and device.type == "cuda" and not has_bf16:
        raise InputError("model.compute_dtype=bfloat16: this GPU has no bfloat16; use float32")
    return getattr(torch, config.compute_dtype)


def read_llama_config(config: ModelConfig) -> LlamaConfig:
    """Read the architecture without any weight.

    Raises:
        InputError: not found, unreadable, no Llama architecture, or quantised in another way than the config says.
    """
    from transformers import AutoConfig, LlamaConfig

    folder = Path(config.path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json; model.path must be a transformers model folder or a hub id")
    try:
        loaded = AutoConfig.from_pretrained(config.path, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"model.path={config.path}: not a readable model folder or hub id ({first_line})") from None
    if loaded.model_type != "llama":
        raise InputError(f"model.path={config.path}: architecture {loaded.model_type!r}; only Llama is supported")
    assert isinstance(loaded, LlamaConfig)
    nf4.check_stored(config, loaded)
    return loaded


def load_llama(config: ModelConfig, device: torch.device, place: bool = True) -> LlamaForCausalLM:
    """Load the frozen language model.

    Args:
        config: which, and how it is held.
        device: where it computes.
        place: put the weights on `device` now; false under ZeRO-3, where DeepSpeed places the partitions.

    Returns:
        The model in evaluation mode, no parameter trainable, attention as in the config.

    Raises:
        InputError: see `read_llama_config`; or the weights do not load.
    """
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    nf4.silence_import()
    architecture = read_llama_config(config)
    attention.register()
    dtype = compute_dtype(config, device)
    if config.bits == 4:
        architecture._attn_implementation = config.attention
        model: Any = load_four_bit(config, architecture, dtype, device, place)
        _compute_as_told(model, dtype)
    else:
        model = _load_whole(config, device if place else torch.device("cpu"))
    model.requires_grad_(False)
    model.config.use_cache = False
    recompute_layers(model, recomputed_layers(config.activation_checkpointing, architecture.num_hidden_layers))
    return model.eval()


def _load_whole(config: ModelConfig, device: torch.device) -> LlamaForCausalLM:
    """Load weights that stay whole, bfloat16 or float32, as transformers does."""
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            config.path,
            revision=config.revision,
            trust_remote_code=False,
            dtype={16: torch.bfloat16, 32: torch.float32}[config.bits],
            attn_implementation=config.attention,
            device_map={"": device} if device.type == "cuda" else None,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"model.path={config.path}: weights do not load ({first_line})") from None
    return model


def _compute_as_told(model: Any, dtype: torch.dtype) -> None:
    """Keep float32 computation in float32.

    On a CPU with AVX512-BF16, bitsandbytes silently repacks 4-bit weights in evaluation mode and multiplies in bfloat16
    whatever the compute dtype: answers would then differ from training's and from other machines'.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = dtype == torch.bfloat16 and module.support_avx512bf16_for_cpu


def attach_lora(model: LlamaForCausalLM, config: LoraConfig, base: str) -> PeftModel:
    """Wrap the model's linear layers with float32 adapters; initialised from torch's global generator.

    Args:
        model: the frozen language model.
        config: rank, scale, dropout and which layers.
        base: what adapter_config.json names as the base model.

    Raises:
        InputError: a target matches no layer of the model.
    """
    import peft

    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    unknown = [target for target in config.targets if target not in names]
    if unknown:
        raise InputError(f"lora.targets: no layer of the model is named {unknown[0]!r}")
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT's own call
        adapted = peft.get_peft_model(model, settings)
    assert isinstance(adapted, peft.PeftModel)
    return adapted


def base_fingerprint(config: ModelConfig) -> str:
    """What tells one base model from another without reading gigabytes.

    The sha256 over config.json and, for each weight file, its name, size, and first and last MiB: the first holds the
    safetensors header with every tensor's name, shape and offset.

    Raises:
        InputError: no safetensors weights where `path` points.
    """
    import hashlib

    digest = hashlib.sha256(model_file(config, "config.json").read_bytes())
    for name in weight_file_names(config):
        path = model_file(config, name)
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(f"{name}:{size}:".encode() + file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()
