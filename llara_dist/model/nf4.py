"""NF4, the 4-bit form of linear layers: how it is made, and what a model folder says of weights stored in it."""

from __future__ import annotations

import math
from logging import getLogger
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llara_dist.config import ModelConfig
from llara_dist.errors import InputError

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from transformers import BitsAndBytesConfig, LlamaConfig

BLOCK = 64
"""elements that share a scale (QLoRA, arXiv 2305.14314)"""
NESTED_BLOCK = 256
"""scales that share a scale of theirs: double quantisation"""
PIECE = 1 << 16
"""elements quantised at once on a CPU, a multiple of BLOCK; larger pieces are no faster and fragment the heap"""


def silence_import() -> None:
    """Keep bitsandbytes from warning, on its import, of an optional CPU kernel that is of no use here."""
    getLogger("bitsandbytes").setLevel("ERROR")


def settings(config: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What the model's config says of its weights, and adapters and later loads go by.

    Args:
        config: for `quant_storage`.
        dtype: what matrix products run in.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=getattr(torch, config.quant_storage),
    )


def stored_settings(architecture: LlamaConfig) -> dict[str, Any] | None:
    """The quantization_config of a model whose weights were stored quantised; None for one that is not."""
    found: Any = getattr(architecture, "quantization_config", None)
    return found.to_dict() if hasattr(found, "to_dict") else found


def check_stored(config: ModelConfig, architecture: LlamaConfig) -> None:
    """Weights that were stored quantised are what the config asks for.

    Raises:
        InputError: names what differs, and what to do.
    """
    stored = stored_settings(architecture)
    if stored is None:
        return
    where = f"{config.path}/config.json: quantization_config"
    if config.bits != 4:
        raise InputError(
            f"{where}: the weights are stored quantised, model.bits={config.bits} asks for whole ones; "
            "set model.bits=4 or give the model that they were made from"
        )
    expected = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    for name, value in expected.items():
        if stored.get(name) != value:
            raise InputError(
                f"{where}.{name} is {stored.get(name)!r}, only {value!r} is supported; "
                "give the model that it was made from, or what `llara-dist quantize` makes of it"
            )
    if stored.get("bnb_4bit_quant_storage", "uint8") != config.quant_storage:
        raise InputError(
            f"{where}.bnb_4bit_quant_storage is {stored.get('bnb_4bit_quant_storage', 'uint8')!r}, "
            f"model.quant_storage is {config.quant_storage!r}; set that, or quantise anew with --quant_storage"
        )


def quantise(weight: Tensor, storage: torch.dtype) -> tuple[Tensor, QuantState]:
    """NF4 with double quantisation, bit for bit what `bitsandbytes.functional.quantize_4bit` returns.

    On a CPU that function's intermediates take up to 12 bytes an element, more than the layer itself; in pieces of
    whole blocks they take less than 1 MB. A GPU needs none and takes the weight whole.

    Args:
        weight: [out, in] float32, float16 or bfloat16, on the device that quantises.
        storage: dtype that holds the packed bytes.

    Returns:
        Packed weights [⌈n/2⌉ ÷ bytes of `storage`, 1], high nibble first, and what takes them back.
    """
    from bitsandbytes import functional

    whole = {"blocksize": BLOCK, "quant_type": "nf4", "quant_storage": storage}
    if weight.device.type != "cpu" or weight.numel() <= PIECE:
        return functional.quantize_4bit(weight, compress_statistics=True, **whole)
    flat = weight.reshape(-1)
    count = math.ceil(flat.numel() / BLOCK)
    packed = torch.empty(math.ceil(flat.numel() / 2), dtype=torch.uint8)
    absmax = torch.empty(count, dtype=torch.float32)
    for start in range(0, flat.numel(), PIECE):
        piece, state = functional.quantize_4bit(flat[start : start + PIECE], blocksize=BLOCK, quant_type="nf4")
        packed[start // 2 : start // 2 + piece.numel()] = piece.reshape(-1)
        absmax[start // BLOCK : start // BLOCK + state.absmax.numel()] = state.absmax
    offset = absmax.mean()
    scales, nested = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    return packed.view(storage).unsqueeze(1), functional.QuantState(
        absmax=scales,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=functional.get_4bit_type("nf4", device=weight.device),
        quant_type="nf4",
        offset=offset,
        state2=nested,
    )
