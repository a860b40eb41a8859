"""The base model's files, looked at without reading a weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from llara_dist.config import ModelConfig
from llara_dist.errors import InputError
from llara_dist.model.nf4 import stored_settings
from llara_dist.model.weight_files import WeightFiles, find_model_file, weight_file_names

if TYPE_CHECKING:
    from transformers import LlamaConfig

FLOATS = {"F32", "F16", "BF16"}
"""dtypes, as safetensors names them, that weights which are no quantised ones can have"""


def held_as(config: ModelConfig, architecture: LlamaConfig) -> str:
    """How the weights will be held, in words; that a stored quantisation fits was checked with the architecture."""
    held = f"NF4 packed in {config.quant_storage}" if config.bits == 4 else f"{config.bits} bits"
    return held if stored_settings(architecture) is None else f"{held}, as stored"


def check_weight_files(config: ModelConfig, architecture: LlamaConfig) -> str:
    """Every weight file is there and whole, which its header tells; returns what they hold, in words.

    Raises:
        InputError: a file is missing or damaged, or holds dtypes that are not known; or the hub is needed and off.
    """
    from transformers.utils.hub import is_offline_mode

    if is_offline_mode() and not Path(config.path).is_dir():
        for name in weight_file_names(config):
            if find_model_file(config, name) is None:
                raise InputError(
                    f"model.path={config.path}: {name} is not in this node's hub cache and HF_HUB_OFFLINE is set; "
                    "fetch it where there is a network, or unset HF_HUB_OFFLINE"
                )
    tensors = WeightFiles(config).tensors.values()
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    odd = sorted(sizes.keys() - FLOATS)
    if odd and stored_settings(architecture) is None:
        raise InputError(
            f"model.path={config.path}: weights of dtype {odd[0]}; give the model in float32, bfloat16 or float16"
        )
    files = len({tensor.file for tensor in tensors})
    numbers = ", ".join(f"{count / 1e6:,.1f} M {dtype}" for dtype, count in sorted(sizes.items()))
    return f"{files} whole file{'s' if files > 1 else ''}: {numbers}"
