"""The item table: the vectors that become behaviour tokens, and the folder in which a recommender is stored.

A folder holds `item_table.safetensors` (tensor "weight", fp32 [num_items, dim]), `weights.safetensors` (the
recommender's own parameters) and `recommender.json` (which model, of which data set, its scores, sha256 of the other
two), which is written last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from llara_dist.errors import InputError
from llara_dist.integrity import read_json, sha256_bytes, sha256_file, staged_folder, write_file, write_json
from llara_dist.recommenders.recommender import Recommender

FORMAT_VERSION = 1
TABLE_FILE = "item_table.safetensors"
WEIGHTS_FILE = "weights.safetensors"
INFO_FILE = "recommender.json"


@dataclass(frozen=True)
class ItemTable:
    """Item vectors and where they come from.

    Fields:
        weight: fp32 [num_items, dim], on the CPU.
        info: `recommender.json`.
    """

    weight: Tensor
    info: dict[str, Any]

    @property
    def num_items(self) -> int:
        """Size of the catalogue."""
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        """Width of an item's vector."""
        return self.weight.shape[1]

    @property
    def dataset_hash(self) -> str | None:
        """Hash of the data set the recommender was trained on; None where that is not known."""
        return self.info.get("dataset_hash")


def write_recommender(out: Path, recommender: Recommender, info: dict[str, Any]) -> dict[str, Any]:
    """Write a recommender's folder, whole or not at all.

    Args:
        out: the folder; must not exist yet, or be empty.
        recommender: whose weights and item vectors are stored.
        info: `recommender.json` without format_version, num_items, dim and files, which are filled in here.

    Returns:
        The whole of `recommender.json`.

    Raises:
        InputError: `out` exists.
    """
    table = recommender.item_vectors().detach().float().cpu().contiguous()
    blobs = {
        TABLE_FILE: save({"weight": table}),
        WEIGHTS_FILE: save(
            {name: value.detach().cpu().contiguous() for name, value in recommender.state_dict().items()}
        ),
    }
    info = {
        "format_version": FORMAT_VERSION,
        **info,
        "num_items": table.shape[0],
        "dim": table.shape[1],
        "files": {name: sha256_bytes(blob) for name, blob in blobs.items()},
    }
    with staged_folder(out) as staging:
        for name, blob in blobs.items():
            write_file(staging / name, blob)
        write_json(staging / INFO_FILE, info)
    return info


def read_info(path: Path) -> dict[str, Any]:
    """Read a recommender folder's `recommender.json`.

    Raises:
        InputError: missing, not JSON, or of another format version.
    """
    path = Path(path)
    info = read_json(path / INFO_FILE, "a recommender folder (made by `llara-dist recommender train`)")
    if info.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path / INFO_FILE}: format_version {info.get('format_version')!r}, this release reads {FORMAT_VERSION}; "
            "train the recommender again"
        )
    return info


def read_tensors(path: Path, file: str, info: dict[str, Any]) -> dict[str, Tensor]:
    """Read one of the folder's safetensors files after comparing its sha256 with `recommender.json`.

    Raises:
        InputError: the file is missing, damaged or no safetensors file.
    """
    full = Path(path) / file
    if not full.is_file():
        raise InputError(f"{full}: not found; the recommender folder is incomplete, train it again")
    if sha256_file(full) != info.get("files", {}).get(file):
        raise InputError(f"{full}: sha256 differs from {INFO_FILE}; the file is damaged, train the recommender again")
    try:
        return load_file(full)
    except SafetensorError as error:
        raise InputError(f"{full}: not a safetensors file ({error})") from None


def load_item_table(path: Path) -> ItemTable:
    """Load the item table of a recommender folder, or of a published ``.npz``.

    Args:
        path: a folder made by `llara-dist recommender train`, or a published recommender's ``.npz``.

    Raises:
        InputError: missing, damaged, or not [num_items, dim] fp32 of finite numbers.
    """
    path = Path(path)
    if path.suffix == ".npz":
        # Imported here, since published.py is needed for nothing else and builds whole models.
        from llara_dist.recommenders.published import load_published

        model = load_published(path)
        info = {
            "model": type(model).__name__,
            "num_items": model.num_items,
            "dim": model.dim,
            "files": {path.name: sha256_file(path)},
        }
        return ItemTable(weight=model.item_vectors().clone(), info=info)
    info = read_info(path)
    weight = read_tensors(path, TABLE_FILE, info).get("weight")
    shape = (info.get("num_items"), info.get("dim"))
    if weight is None or tuple(weight.shape) != shape or weight.dtype != torch.float32:
        found = "nothing" if weight is None else f"{weight.dtype} {tuple(weight.shape)}"
        raise InputError(f"{path / TABLE_FILE}: tensor 'weight' must be float32 {shape}, found {found}")
    if not torch.isfinite(weight).all():
        raise InputError(f"{path / TABLE_FILE}: holds values that are not finite; train the recommender again")
    return ItemTable(weight=weight, info=info)
