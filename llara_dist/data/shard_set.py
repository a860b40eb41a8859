"""What makes shards a shards folder: the manifest of each split, then shards.json over all, which ends a build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llara_dist import console
from llara_dist.data import shards as form
from llara_dist.data.dataset import Dataset
from llara_dist.data.records import shard_set_manifest, shards_info, split_entry
from llara_dist.integrity import write_json


def head_of(dataset: Dataset, tokenizer_hash: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """What two builds must have in common to have the same bytes."""
    return {
        "dataset": {"name": dataset.info["name"], "hash": dataset.hash},
        "domain": dataset.domain,
        "num_items": dataset.num_items,
        "tokenizer_hash": tokenizer_hash,
        "recipe": recipe,
    }


def write_manifest(folder: Path, split: str, head: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """Write a split's manifest; returns its entry in shards.json.

    Args:
        folder: the shards folder being made.
        split: "train", "val" or "test".
        head: of the build.
        written: the split's passes, shards in order, entry of the index, and counts.
    """
    manifest = shard_set_manifest(split, head, written["passes"], written["shards"], written["index"])
    write_json(folder / split / form.MANIFEST, manifest)
    names = ("tokens", "longest_row_tokens", "rows_with_history_dropped", "history_items_dropped")
    return split_entry(manifest, *(written[name] for name in names))


def write_shards_info(
    folder: Path, head: dict[str, Any], about: dict[str, Any], counts: dict[str, int], splits: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Write shards.json, the last file of a shards folder; returns it.

    Args:
        folder: the shards folder being made; items.parquet is there.
        head: of the build.
        about: tokenizer and vocabulary.
        counts: of the titles.
        splits: each split's entry.
    """
    info = shards_info(head, about, counts, splits, folder / form.ITEMS)
    write_json(folder / form.SHARDS, info)
    return info


def report(out: Path, info: dict[str, Any], seconds: float) -> None:
    """Show what a shards folder holds."""
    columns = ["split", "samples", "shards", "MB", "mean tokens", "longest", "rows cut", "history items dropped"]
    console.table(
        f"{out}: {info['dataset']['name']}",
        columns,
        [
            [
                name,
                f"{split['samples']:,}",
                split["shards"],
                f"{split['bytes'] / 1e6:.1f}",
                f"{split['tokens'] / max(1, split['samples']):.1f}",
                split["longest_row_tokens"],
                split["rows_with_history_dropped"],
                split["history_items_dropped"],
            ]
            for name, split in info["splits"].items()
        ],
    )
    total = sum(split["samples"] for split in info["splits"].values())
    counts, recipe = info["counts"], info["recipe"]
    console.say(
        f"{total:,} samples in {seconds:.1f} s; {counts['titles_cut']} titles cut to {recipe['max_title_tokens']} "
        f"tokens, {counts['titles_shared']} items share their shown title with another"
    )
