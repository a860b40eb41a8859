"""`llara-dist recommender join`: the item tables of several data sets as one, in the order of a mixture's sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from llara_dist import console
from llara_dist.errors import InputError
from llara_dist.integrity import sha256_bytes, sha256_json, staged_folder, write_file, write_json
from llara_dist.recommenders.item_table import FORMAT_VERSION, INFO_FILE, TABLE_FILE, load_item_table


def join(tables: list[Path], out: Path) -> dict[str, Any]:
    """Concatenate item tables: the items of the second follow those of the first, and so on.

    Args:
        tables: folders made by `llara-dist recommender train`, or published `.npz`, in the order in which
            `llara-dist shards mix` was given their shards.
        out: the folder to make; its item table is what `recommender.path` of a run on the mixture names.

    Returns:
        recommender.json as written.

    Raises:
        InputError: a table cannot be read, the widths differ, or `out` exists.
    """
    if not tables:
        raise InputError("--tables: name at least one recommender")
    loaded = [load_item_table(Path(table)) for table in tables]
    for path, table in zip(tables, loaded, strict=True):
        if table.dim != loaded[0].dim:
            raise InputError(
                f"{path}: item vectors of width {table.dim}, those of {tables[0]} have {loaded[0].dim}; "
                "train both recommenders with the same width"
            )
    blob = save({"weight": torch.cat([table.weight for table in loaded]).contiguous()})
    hashes = [table.dataset_hash for table in loaded]
    known = None if None in hashes else sha256_json(hashes)
    info = {
        "format_version": FORMAT_VERSION,
        "model": "joined",
        "dataset_hash": known,
        "parts": [
            {"model": table.info.get("model"), "dataset_hash": table.dataset_hash, "num_items": table.num_items}
            for table in loaded
        ],
        "num_items": sum(table.num_items for table in loaded),
        "dim": loaded[0].dim,
        "files": {TABLE_FILE: sha256_bytes(blob)},
    }
    with staged_folder(Path(out)) as staging:
        write_file(staging / TABLE_FILE, blob)
        write_json(staging / INFO_FILE, info)
    console.say(f"{out}: {info['num_items']:,} items of {len(tables)} tables, width {info['dim']}")
    return {"out": str(out), **info}
