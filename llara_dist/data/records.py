"""What manifest.json and shards.json say of a build: composed here, by the build and by whoever derives them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist.data import shards as form
from llara_dist.data.prompts import PromptEncoder
from llara_dist.integrity import sha256_file

IDENTITY = ("dataset", "domain", "num_items", "tokenizer_hash", "recipe")
"""what decides every byte; manifests and shards.json of one build hold the same"""


def identity_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The identity that a manifest or shards.json holds."""
    return {name: record[name] for name in IDENTITY}


def shard_set_manifest(
    split: str,
    identity: Mapping[str, Any],
    passes: int,
    shards: Sequence[Mapping[str, Any]],
    index: Mapping[str, Any],
) -> dict[str, Any]:
    """A split's manifest.json.

    Args:
        split: its name.
        identity: of the build.
        passes: of this split.
        shards: per shard "pass", "samples", "bytes", "sha256", in order.
        index: the index's entry, as its writer returns it.
    """
    return form.seal(
        {
            "format_version": form.FORMAT_VERSION,
            "split": split,
            **identity,
            "passes": passes,
            "samples": sum(shard["samples"] for shard in shards),
            "shards": [{"name": form.shard_name(number), **shard} for number, shard in enumerate(shards)],
            "index": index,
        }
    )


def split_entry(
    manifest: Mapping[str, Any], tokens: int, longest: int, rows_shortened: int, history_dropped: int
) -> dict[str, Any]:
    """A split's entry in shards.json.

    Args:
        manifest: of the split.
        tokens: hybrid positions of all its samples.
        longest: of one sample.
        rows_shortened: rows whose oldest history was left out to fit.
        history_dropped: items left out of them.
    """
    return {
        "samples": manifest["samples"],
        "passes": manifest["passes"],
        "shards": len(manifest["shards"]),
        "bytes": sum(shard["bytes"] for shard in manifest["shards"]),
        "tokens": tokens,
        "longest_row_tokens": longest,
        "rows_with_history_dropped": rows_shortened,
        "history_items_dropped": history_dropped,
        "hash": manifest["hash"],
    }


def shards_info(
    identity: Mapping[str, Any],
    about: Mapping[str, Any],
    titles: Mapping[str, int],
    splits: Mapping[str, Mapping[str, Any]],
    items: Path,
) -> dict[str, Any]:
    """shards.json.

    Args:
        identity: of the build.
        about: the tokenizer as it was given, and its vocabulary.
        titles: `title_counts` of the catalogue.
        splits: each split's entry.
        items: the items.parquet that was written.
    """
    return form.seal(
        {
            "format_version": form.FORMAT_VERSION,
            **identity,
            **about,
            "counts": {
                **titles,
                "longest_row_tokens": max(split["longest_row_tokens"] for split in splits.values()),
            },
            "splits": splits,
            "items_bytes": items.stat().st_size,
            "items_sha256": sha256_file(items),
        }
    )


def title_counts(encoder: PromptEncoder) -> dict[str, int]:
    """What the build counts of the titles as prompts show them."""
    shown = np.unique(np.array(encoder.shown), return_counts=True)[1]
    return {"titles_cut": len(encoder.cut_items), "titles_shared": int(shown[shown > 1].sum())}


def write_items(path: Path, titles: list[str], shown: list[str]) -> None:
    """Write items.parquet: the catalogue's titles, and as prompts show them, by item id."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = pa.array(np.arange(len(titles), dtype=np.int32))
    table = pa.table({"item_id": ids, "title": pa.array(titles, pa.string()), "shown": pa.array(shown, pa.string())})
    pq.write_table(table, path, compression="zstd", store_schema=False)
