"""A Llama with 4-bit linear layers: quantised while it is read, one layer at a time, or read as it was stored.

transformers quantises while it loads as well, but bitsandbytes' intermediates then take more memory than the layer
and fragment the heap. Here the host holds the tensors that the model keeps and, beside them, what one piece of a layer
takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llara_dist.config import ModelConfig
from llara_dist.errors import InputError
from llara_dist.model.nf4 import quantise, settings, stored_settings
from llara_dist.model.weight_files import WeightFiles

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

STATE = (
    "weight.absmax",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_map",
    "weight.quant_state.bitsandbytes__nf4",
)
"""what a stored 4-bit linear layer has beside its `weight`"""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FLOATS = ("F32", "F16", "BF16")
_STORAGE = {"uint8": "U8", "float32": "F32"}


@dataclass(frozen=True)
class Part:
    """One parameter of the model and the tensors that it is read from.

    Attributes:
        name: the parameter's.
        sources: names of tensors in the files: its own, and those of the quantisation state where it was stored so.
        shape: of the values; a linear layer's [out, in] also where they are packed.
        linear: whether it is the weight of a linear layer that is held in 4 bits.
    """

    name: str
    sources: list[str]
    shape: torch.Size
    linear: bool


def skeleton(architecture: LlamaConfig, chosen: BitsAndBytesConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """The model without values: parameters on `meta`, every linear layer but the head a `Linear4bit`."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AutoHfQuantizer

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    quantizer: Any = AutoHfQuantizer.from_config(chosen)
    quantizer.preprocess_model(model=model, device_map=None)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    return model


def match(model: LlamaForCausalLM, weights: WeightFiles, stored: bool, storage: str) -> list[Part]:
    """Find every parameter of the model in its files, by their headers, before any value is read.

    Args:
        model: as `skeleton` made it.
        weights: its files.
        stored: whether they hold quantised weights.
        storage: `quant_storage` of the config.

    Returns:
        Each parameter once, in the model's order; a tied head is its embeddings.

    Raises:
        InputError: a tensor is missing, too many, or of another shape or dtype; names it and its file.
    """
    import bitsandbytes

    found: list[Part] = []
    left = dict(weights.tensors)
    for name, parameter in model.named_parameters():
        packed = isinstance(parameter, bitsandbytes.nn.Params4bit)
        sources = [name] + [name.removesuffix("weight") + end for end in STATE if packed and stored]
        for source in sources:
            if source not in left:
                raise InputError(f"model.path={weights.path}: its safetensors files hold no {source}")
        given = left[name]
        shape, dtypes = tuple(parameter.shape), _FLOATS
        if packed and stored:
            dtypes = (_STORAGE[storage],)
            shape = (math.ceil(parameter.numel() / 2) // getattr(torch, storage).itemsize, 1)
        if given.shape != shape or given.dtype not in dtypes:
            raise InputError(
                f"{given.file}: {name} is {given.dtype} {list(given.shape)}, "
                f"the model needs {' or '.join(dtypes)} {list(shape)}"
            )
        for source in sources:
            del left[source]
        found.append(Part(name, sources, parameter.shape, packed))
    for name, surplus in left.items():
        if name == HEAD and model.config.tie_word_embeddings:
            _check_tied(weights, surplus.file)
        elif not name.endswith("rotary_emb.inv_freq"):  # of older checkpoints; it follows from the config
            raise InputError(f"{surplus.file}: {name} belongs to no parameter of the model")
    return found


def _check_tied(weights: WeightFiles, file: Path) -> None:
    """A head that is stored although it is tied must be the embeddings."""
    with weights.mapped([HEAD, EMBEDDING]) as (head, embedding):
        if not torch.equal(head, embedding):
            raise InputError(
                f"{file}: {HEAD} differs from {EMBEDDING}; set tie_word_embeddings to false in config.json"
            )


def load_four_bit(
    config: ModelConfig, architecture: LlamaConfig, dtype: torch.dtype, device: torch.device, place: bool
) -> LlamaForCausalLM:
    """A model with NF4 linear layers; embeddings, norms and head in `dtype`.

    Beside the tensors that the model keeps, the host holds one tensor's values at a time as pages of a mapped file,
    and the intermediates of one piece. Packed weights follow from the stored values alone: `dtype` says what they are
    taken back to, and does not round them before.

    Args:
        config: which model, and `quant_storage`.
        architecture: as `read_llama_config` returns it.
        dtype: what matrix products run in.
        device: where layers are quantised, one at a time.
        place: whether they stay there; else they go to the CPU.

    Raises:
        InputError: the files do not hold what the model needs; names file and tensor.
    """
    weights = WeightFiles(config)
    stored = stored_settings(architecture) is not None
    model = skeleton(architecture, settings(config, dtype), dtype)
    home = device if place else torch.device("cpu")
    for part in match(model, weights, stored, config.quant_storage):
        path, _, leaf = part.name.rpartition(".")
        module: Any = model.get_submodule(path)
        if not part.linear:
            with weights.mapped(part.sources) as (values,):
                copied = values.to(home, dtype, copy=True)
            setattr(module, leaf, nn.Parameter(copied, requires_grad=False))
            del values
        elif stored:
            _set_packed(module, *_read_packed(weights, part, home), dtype)
        else:
            _set_packed(module, *quantise_part(weights, part, config.quant_storage, device, home), dtype)
    model.tie_weights()
    rotary: Any = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config).to(home)  # its buffers were on `meta` like the parameters
    return model


def quantise_part(
    weights: WeightFiles, part: Part, storage: str, device: torch.device, home: torch.device
) -> tuple[Tensor, QuantState]:
    """Read a linear layer's weight, quantise it on one device, and keep the packed bytes on another."""
    with weights.mapped(part.sources) as (values,):
        packed, state = quantise(values.to(device), getattr(torch, storage))
    state.to(home)
    return packed.to(home), state


def _read_packed(weights: WeightFiles, part: Part, home: torch.device) -> tuple[Tensor, QuantState]:
    """Read a linear layer's weight that was stored packed."""
    from bitsandbytes.functional import QuantState

    with weights.mapped(part.sources) as (values, *rest):
        packed = values.to(home, copy=True)
        items: dict[str, Any] = {name: value.clone() for name, value in zip(part.sources[1:], rest, strict=True)}
    try:
        state = QuantState.from_dict(items, home)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(
            f"{weights.tensors[part.name].file}: the quantisation state of {part.name} is damaged ({error}); "
            "quantise the model anew"
        ) from None
    if state.shape != part.shape:
        raise InputError(
            f"{weights.tensors[part.name].file}: {part.name} was quantised from {list(state.shape or ())}, "
            f"the model needs {list(part.shape)}"
        )
    return packed, state


def _set_packed(module: Any, packed: Tensor, state: QuantState, dtype: torch.dtype) -> None:
    """Give a Linear4bit its weight, to be taken back to `dtype`."""
    import bitsandbytes

    kind: Any = bitsandbytes.nn.Params4bit
    state.dtype = dtype
    module.weight = kind(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=packed.dtype,
        module=module,
        bnb_quantized=True,
    )
    module.quant_state = state
