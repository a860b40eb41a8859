"""`llara-dist shards build`: a dataset folder and a tokenizer → shards, the same bytes whatever the processes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist import console
from llara_dist.data import shards as form
from llara_dist.data.dataset import Dataset, load_dataset
from llara_dist.data.prompts import DEFAULT_MAX_TITLE_TOKENS, PromptEncoder
from llara_dist.data.records import shard_set_manifest, shards_info, split_entry, write_items
from llara_dist.data.rows import Rows
from llara_dist.data.shard_index import INDEX, write_index
from llara_dist.data.shard_writing import (
    Drawing,
    draw_rows,
    draw_templates,
    place_rows,
    shard_tasks,
    take_rows,
    write_shards,
)
from llara_dist.data.tokenizer import load_tokenizer, tokenizer_hash
from llara_dist.data.units import RowBlock
from llara_dist.data.wording import load_templates
from llara_dist.errors import InputError
from llara_dist.integrity import staged_folder, write_json

_CHECKED_ROWS = 256
"""rows of each split compared with the tokenisation of their whole string before anything is written"""


def check_segments(
    encoder: PromptEncoder, rows: Rows, candidates: np.ndarray, templates: np.ndarray, block: RowBlock
) -> None:
    """Compare rows with the tokenisation of the whole string.

    Raises:
        InputError: a row differs; the tokenizer cannot be used with prompts cut at spaces (names the key).
    """
    for row in range(len(rows)):
        sample = block.sample(row, int(rows.keys[row]), 0)
        prompt = encoder.text(sample.history, candidates[row], int(templates[row]))
        whole = encoder.whole_ids(prompt, int(rows.targets[row]))
        if not np.array_equal(np.delete(sample.tokens, sample.slot_positions), whole):
            raise InputError(
                f"tokenizer: key {int(rows.keys[row])} tokenised in segments differs from the whole string; its tokens "
                "depend on more than the text between two spaces, use a SentencePiece-BPE or byte-level BPE tokenizer"
            )


def build(
    data: Path,
    tokenizer: str,
    out: Path,
    passes: int = 1,
    processes: int | None = None,
    max_tokens: int = 1024,
    max_title_tokens: int = DEFAULT_MAX_TITLE_TOKENS,
    samples_per_shard: int = 8192,
    seed: int = 0,
    templates: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Turn a dataset folder into WebDataset shards for one tokenizer.

    Example: llara-dist shards build --data data/movielens --tokenizer models/llama --out shards/out/movielens

    Args:
        data: dataset folder, made by `llara-dist prepare`.
        tokenizer: folder or hub id of the model or its tokenizer.
        out: shards folder to make.
        passes: full draws of templates and training candidates; epoch e reads pass e mod passes.
        processes: worker processes, all cores by default; the bytes do not depend on it.
        max_tokens: longest row, slots and EOS included; the oldest history is dropped to fit.
        max_title_tokens: a longer title is cut.
        samples_per_shard: samples in one tar.
        seed: decides placement, templates and training candidates.
        templates: YAML file of own wordings; the data set's domain decides by default.
        overwrite: replace an existing shards folder.
    """
    started = time.perf_counter()
    for name, value in (("passes", passes), ("max_tokens", max_tokens), ("samples_per_shard", samples_per_shard)):
        if value < 1:
            raise InputError(f"--{name} is {value}; must be at least 1")
    if passes > 99:
        raise InputError(f"--passes is {passes}; at most 99")
    if processes is not None and processes < 1:
        raise InputError(f"--processes is {processes}; must be at least 1")
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        if not overwrite:
            raise InputError(f"{out}: exists already; remove it, choose another --out, or give --overwrite true")
        if not (Path(out) / form.SHARDS).is_file():
            raise InputError(f"{out}: --overwrite true replaces a shards folder only, and this is none")
    dataset = load_dataset(Path(data))
    loaded = load_tokenizer(tokenizer)
    encoder = PromptEncoder(loaded, dataset.titles, load_templates(templates or dataset.domain), max_title_tokens)
    drawing = Drawing(encoder.table(dataset.num_candidates), seed, max_tokens, *dataset.touched)
    _check_some_rows(encoder, dataset, drawing)

    recipe = {
        "seed": seed,
        "passes": passes,
        "max_tokens": max_tokens,
        "max_title_tokens": max_title_tokens,
        "samples_per_shard": samples_per_shard,
        "num_candidates": dataset.num_candidates,
        "templates": [template.text for template in encoder.templates],
    }
    identity = {
        "dataset": {"name": dataset.info["name"], "hash": dataset.hash},
        "domain": dataset.domain,
        "num_items": dataset.num_items,
        "tokenizer_hash": tokenizer_hash(loaded),
        "recipe": recipe,
    }
    workers = processes or len(os.sched_getaffinity(0))
    with staged_folder(Path(out), replace=overwrite) as staging:
        splits = {
            split: _write_split(staging, split, dataset, drawing, identity, 1 if split != "train" else passes, workers)
            for split in form.SPLITS
        }
        write_items(staging / form.ITEMS, dataset.titles, encoder.shown)
        info = shards_info(identity, str(tokenizer), encoder, splits, staging / form.ITEMS)
        write_json(staging / form.SHARDS, info)
    seconds = time.perf_counter() - started
    _report(Path(out), info, seconds)
    return {"out": str(out), "seconds": round(seconds, 2), **info}


def _check_some_rows(encoder: PromptEncoder, dataset: Dataset, drawing: Drawing) -> None:
    """Whole-string check on a hashed sample of each split's rows, before anything is written."""
    for split in form.SPLITS:
        whole, frozen = dataset.rows(split), dataset.candidates.get(split)
        order = place_rows(whole.keys, drawing.seed, 0)[:_CHECKED_ROWS]
        if len(order):
            rows = take_rows(whole, order)
            block, candidates = draw_rows(rows, None if frozen is None else frozen[order], drawing, 0)
            templates = draw_templates(rows.keys, drawing.seed, 0, len(encoder.templates))
            check_segments(encoder, rows, candidates, templates, block)


def _write_split(
    staging: Path, split: str, dataset: Dataset, drawing: Drawing, identity: dict[str, Any], passes: int, workers: int
) -> dict[str, Any]:
    """Write one shard set; returns its entry in shards.json."""
    folder = staging / split
    folder.mkdir()
    rows, recipe = dataset.rows(split), identity["recipe"]
    tasks = shard_tasks(folder, rows, dataset.candidates.get(split), passes, drawing.seed, recipe["samples_per_shard"])
    number = passes * -(-len(rows) // recipe["samples_per_shard"])
    results = list(
        console.progress(write_shards(tasks, drawing, max(1, min(workers, number))), f"shards of {split}", total=number)
    )
    indexes = [result.index for result in results]
    manifest = shard_set_manifest(
        split, identity, passes, [result.entry() for result in results], write_index(folder / INDEX, indexes)
    )
    write_json(folder / form.MANIFEST, manifest)
    return split_entry(
        manifest,
        (index.tokens for index in indexes),
        sum(result.rows_shortened for result in results),
        sum(result.history_dropped for result in results),
    )


def _report(out: Path, info: dict[str, Any], seconds: float) -> None:
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
