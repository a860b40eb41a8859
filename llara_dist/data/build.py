"""`llara-dist shards build`: a dataset folder and a tokenizer → shards, the same bytes whatever the processes.

A build is one part of one, or part i of n: each part builds every n-th shard, and `llara_dist.data.parts` merges them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist import console
from llara_dist.data import parts as build_parts
from llara_dist.data import shards as form
from llara_dist.data.dataset import Dataset, load_dataset
from llara_dist.data.drawing import Drawing, draw_rows, draw_templates
from llara_dist.data.placement import Split, first_placed, place_shards, shards_of_part
from llara_dist.data.prompts import DEFAULT_MAX_TITLE_TOKENS, PromptEncoder
from llara_dist.data.records import title_counts, write_items
from llara_dist.data.rows import Rows
from llara_dist.data.samples import pack
from llara_dist.data.shard_index import INDEX, IndexWriter
from llara_dist.data.shard_set import head_of, report, write_manifest, write_shards_info
from llara_dist.data.shard_writing import shard_tasks, write_shards
from llara_dist.data.tokenizer import load_tokenizer, tokenizer_hash
from llara_dist.data.units import RowBlock
from llara_dist.data.wording import load_templates
from llara_dist.errors import InputError
from llara_dist.integrity import staged_folder

_CHECKED_ROWS = 256
"""rows of each split compared with the tokenisation of their whole string before anything is written"""
_DRAWING = ".drawing"
"""what workers map, in the staging folder until the shards are written"""


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
    shard_mib: int = 256,
    samples_per_shard: int | None = None,
    seed: int = 0,
    templates: str | None = None,
    overwrite: bool = False,
    part: str | None = None,
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
        shard_mib: about how many MiB a tar has; what decides samples_per_shard.
        samples_per_shard: samples in one tar, instead of shard_mib.
        seed: decides placement, templates and training candidates.
        templates: YAML file of own wordings; the data set's domain decides by default.
        overwrite: replace an existing shards folder, or an existing part.
        part: i/n builds every n-th shard only, into OUT.parts; `llara-dist shards merge OUT` makes OUT of all n.
    """
    started = time.perf_counter()
    numbers = (("passes", passes), ("max_tokens", max_tokens), ("shard_mib", shard_mib), ("processes", processes))
    for name, value in (*numbers, ("samples_per_shard", samples_per_shard)):
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}; must be at least 1")
    if passes > 99:
        raise InputError(f"--passes is {passes}; at most 99")
    out = Path(out)
    chosen = None if part is None else build_parts.Part.parse(part)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise InputError(f"{out}: exists already; remove it, choose another --out, or give --overwrite true")
        if not (out / form.SHARDS).is_file():
            raise InputError(f"{out}: --overwrite true replaces a shards folder only, and this is none")
    if chosen is not None:
        build_parts.require_same_number(out, chosen)
    dataset = load_dataset(Path(data))
    loaded = load_tokenizer(tokenizer)
    encoder = PromptEncoder(loaded, dataset.titles, load_templates(templates or dataset.domain), max_title_tokens)
    drawing = Drawing(encoder.table(dataset.num_candidates), seed, max_tokens, *dataset.touched)
    member_bytes = _examine_some_rows(encoder, dataset, drawing)
    head = head_of(
        dataset,
        tokenizer_hash(loaded),
        {
            "seed": seed,
            "passes": passes,
            "max_tokens": max_tokens,
            "max_title_tokens": max_title_tokens,
            "samples_per_shard": samples_per_shard or max(1, int((shard_mib << 20) // member_bytes)),
            "num_candidates": dataset.num_candidates,
            "templates": [template.text for template in encoder.templates],
        },
    )
    workers = processes or len(os.sched_getaffinity(0))
    about = {"tokenizer": str(tokenizer), "vocabulary": len(loaded)}
    if chosen is not None:
        folder = chosen.folder(out)
        if build_parts.is_complete(folder, head, overwrite):
            console.say(f"{folder}: complete already, left alone")
            return {"out": str(folder), "complete": True}
        command = _command(
            data=data,
            tokenizer=tokenizer,
            out=out,
            passes=passes,
            max_tokens=max_tokens,
            max_title_tokens=max_title_tokens,
            samples_per_shard=head["recipe"]["samples_per_shard"],
            seed=seed,
            templates=templates,
        )
        with staged_folder(folder, replace=overwrite) as staging:
            write_items(staging / form.ITEMS, dataset.titles, encoder.shown)
            counts = title_counts(encoder)
            splits = _write_splits(staging, dataset, drawing, head["recipe"], workers, chosen.index, chosen.number)
            info = build_parts.write_part(staging, chosen, head, {**about, "command": command}, counts, splits)
        seconds = time.perf_counter() - started
        samples = sum(split["samples"] for split in splits.values())
        console.say(f"{folder}: {samples:,} samples in {seconds:.1f} s; when all parts are there: shards merge {out}")
        return {"out": str(folder), "complete": True, "seconds": round(seconds, 2), **info}
    with staged_folder(out, replace=overwrite) as staging:
        write_items(staging / form.ITEMS, dataset.titles, encoder.shown)
        splits = _write_splits(staging, dataset, drawing, head["recipe"], workers)
        entries = {split: write_manifest(staging, split, head, written) for split, written in splits.items()}
        info = write_shards_info(staging, head, about, title_counts(encoder), entries)
    seconds = time.perf_counter() - started
    report(out, info, seconds)
    return {"out": str(out), "seconds": round(seconds, 2), **info}


def _command(**options: Any) -> str:
    """The command line that builds a part, without --part; every machine may name its folders otherwise."""
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return " ".join(["llara-dist shards build", *given])


def splits_of(dataset: Dataset) -> dict[str, Split]:
    """The splits as the placement of rows sees them."""
    found, first_key = {}, 0
    for name in form.SPLITS:
        found[name] = Split(partial(dataset.chunks, name), first_key, dataset.num_rows[name])
        first_key += dataset.num_rows[name]
    return found


def _examine_some_rows(encoder: PromptEncoder, dataset: Dataset, drawing: Drawing) -> float:
    """Whole-string check on a hashed sample of each split's rows; returns the mean bytes of their tar members."""
    sizes = []
    for name, split in splits_of(dataset).items():
        rows = first_placed(split, _CHECKED_ROWS, drawing.seed)
        if not len(rows):
            continue
        frozen = dataset.candidates.get(name)
        if frozen is not None:
            frozen = frozen[rows.keys.astype(np.int64) - split.first_key]
        block, candidates = draw_rows(rows, frozen, drawing, 0)
        templates = draw_templates(rows.keys, drawing.seed, 0, len(encoder.templates))
        check_segments(encoder, rows, candidates, templates, block)
        sizes += [
            len(form.tar_member(form.member_name(0, int(key)), pack(block.sample(row, int(key), 0))))
            for row, key in enumerate(rows.keys)
        ]
    return sum(sizes) / len(sizes)


def _write_splits(
    staging: Path,
    dataset: Dataset,
    drawing: Drawing,
    recipe: dict[str, Any],
    workers: int,
    part: int = 0,
    parts: int = 1,
) -> dict[str, dict[str, Any]]:
    """Write the shards and indexes of a part's splits; what is to be known of them, by split."""
    drawing.save(staging / _DRAWING)
    written = {}
    for name, split in splits_of(dataset).items():
        (staging / name).mkdir()
        passes, size = recipe["passes"] if name == "train" else 1, recipe["samples_per_shard"]
        numbers = shards_of_part(split, passes, size, part, parts)
        tasks = shard_tasks(
            staging / name,
            place_shards(split, recipe["seed"], size, numbers),
            dataset.candidates.get(name),
            split.first_key,
        )
        results = write_shards(tasks, staging / _DRAWING, max(1, min(workers, len(numbers))))
        shards, sums = [], dict.fromkeys(("tokens", "rows_with_history_dropped", "history_items_dropped"), 0)
        longest = 0
        index = IndexWriter(staging / name / INDEX)
        for result in console.progress(results, f"shards of {name}", total=len(numbers)):
            index.write(result.index)
            shards.append(result.entry())
            sums["tokens"] += int(result.index.tokens.sum(dtype=np.int64))
            sums["rows_with_history_dropped"] += result.rows_shortened
            sums["history_items_dropped"] += result.history_dropped
            longest = max(longest, int(result.index.tokens.max()))
        written[name] = {
            "passes": passes,
            "samples": sum(shard["samples"] for shard in shards),
            "longest_row_tokens": longest,
            **sums,
            "shards": shards,
            "index": index.close(),
        }
    shutil.rmtree(staging / _DRAWING)
    return written
