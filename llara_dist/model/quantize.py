"""`llara-dist quantize`: 4-bit weights made once, for many ranks and runs to load as they are."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llara_dist import __version__
from llara_dist.config import ModelConfig
from llara_dist.console import progress, say
from llara_dist.distributed import pick_device, read_world
from llara_dist.errors import InputError
from llara_dist.integrity import read_json, sha256_file, staged_folder, write_json
from llara_dist.model.four_bit import Part, match, quantise_part, skeleton
from llara_dist.model.llama import base_fingerprint, read_llama_config
from llara_dist.model.nf4 import BLOCK, settings, silence_import, stored_settings
from llara_dist.model.weight_files import INDEX, WeightFiles, find_model_file, model_file

BESIDE = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
"""files of a model folder that are copied where there are such"""
PROVENANCE = "quantization.json"


def quantize(
    model: str,
    out: Path,
    revision: str | None = None,
    quant_storage: Literal["uint8", "float32"] = "uint8",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    max_shard_mib: int = 2048,
) -> dict[str, Any]:
    """Write a model with NF4 linear layers (double quantisation), as `model.bits=4` would make it at every start.

    A run with `model.path` = the new folder loads the same bytes without quantising; transformers loads it too.
    Embeddings, norms and head keep the dtype that they were stored in. The model is never held whole: a shard is
    written when it is full.

    Args:
        model: folder or hub id of a Llama-architecture model with safetensors weights.
        out: new model folder.
        revision: hub revision (branch, tag or commit); ignored for a folder.
        quant_storage: dtype that holds the packed bytes; what `model.quant_storage` of the runs says.
        device: where layers are quantised, one at a time.
        max_shard_mib: size of a weight file, in MiB, above which the next one begins.

    Returns:
        What was written: folder, bytes, bytes of the source, files.

    Raises:
        InputError: no Llama, quantised already, a damaged file, or `out` exists.
    """
    if max_shard_mib < 1:
        raise InputError(f"quantize: --max_shard_mib {max_shard_mib} must be at least 1")
    config = ModelConfig(path=model, revision=revision, quant_storage=quant_storage)
    architecture = read_llama_config(config)
    if stored_settings(architecture) is not None:
        raise InputError(f"{model}: its weights are quantised already; give the model that they were made from")
    silence_import()
    chosen = pick_device(device, read_world())
    weights = WeightFiles(config)
    # The values' own dtype is what transformers computes in when it loads the folder; runs of ours set their own.
    dtype = architecture.dtype if isinstance(architecture.dtype, torch.dtype) else torch.float32
    bits = settings(config, dtype)
    parts = match(skeleton(architecture, bits, dtype), weights, False, quant_storage)
    with staged_folder(out) as staging:
        shards = ShardWriter(staging, max_shard_mib << 20)
        for part in progress(parts, "quantising"):
            shards.add(_stored_form(weights, part, quant_storage, chosen))
        files = shards.close()
        described = read_json(model_file(config, "config.json"), "a model's config.json")
        write_json(staging / "config.json", {**described, "quantization_config": bits.to_dict()})
        for name in BESIDE:
            found = find_model_file(config, name)
            if found is not None:
                shutil.copyfile(found, staging / name)
        provenance = {
            "source": {"path": model, "revision": revision, "fingerprint": base_fingerprint(config)},
            "quant_type": "nf4",
            "double_quant": True,
            "block_size": BLOCK,
            "quant_storage": quant_storage,
            "device": chosen.type,
            "files": {name: sha256_file(staging / name) for name in files},
            "versions": {"llara_dist": __version__}
            | {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "safetensors")},
        }
        write_json(staging / PROVENANCE, provenance)
    source = sum(file.stat().st_size for file in {stored.file for stored in weights.tensors.values()})
    say(f"written to {out}: {shards.bytes / 2**20:,.1f} MiB of weights, from {source / 2**20:,.1f} MiB")
    return {"out": str(out), "bytes": shards.bytes, "source_bytes": source, "files": files}


def _stored_form(weights: WeightFiles, part: Part, storage: str, device: torch.device) -> dict[str, Tensor]:
    """A parameter as its tensors in a file, named as bitsandbytes' own state dict names them."""
    if not part.linear:
        with weights.mapped(part.sources) as (values,):
            return {part.name: values.clone()}
    packed, state = quantise_part(weights, part, storage, device, torch.device("cpu"))
    return {part.name: packed} | {f"{part.name}.{key}": value for key, value in state.as_dict(packed=True).items()}


class ShardWriter:
    """Safetensors files of bounded size, each written as soon as it is full, and their index.

    Args:
        folder: a staging folder.
        limit: bytes of tensors in a file; one parameter is not split.

    Attributes:
        bytes: of tensors, so far.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.bytes = 0
        self._folder = folder
        self._limit = limit
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._written: list[list[str]] = []

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors of one parameter."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > self._limit:
            self._write()
        self._pending |= tensors
        self._pending_bytes += size
        self.bytes += size

    def close(self) -> list[str]:
        """Write the last file, name all by their number, and write the index where there are several."""
        self._write()
        count = len(self._written)
        names = ["model.safetensors"]
        if count > 1:
            names = [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
            places = {name: file for file, held in zip(names, self._written, strict=True) for name in held}
            write_json(self._folder / INDEX, {"metadata": {"total_size": self.bytes}, "weight_map": places})
        for index, name in enumerate(names):
            (self._folder / f"part-{index}").rename(self._folder / name)
        return names

    def _write(self) -> None:
        from safetensors.torch import save_file

        save_file(self._pending, self._folder / f"part-{len(self._written)}", metadata={"format": "pt"})
        self._written.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0
