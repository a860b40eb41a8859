"""`llara-dist shards build`: a dataset folder and a tokenizer → shards, the same bytes whatever the processes.

Which row lies where is a pure function of (seed, pass, key): a global shuffle inside each pass, so that one user's
windows do not lie together. A shard is made by one process from arrays alone; the tokenizer runs once, in the parent.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist import console
from llara_dist.data import shards as form
from llara_dist.data.candidates import draw_candidates
from llara_dist.data.dataset import Dataset, load_dataset
from llara_dist.data.exclusions import row_exclusions
from llara_dist.data.prompts import (
    DEFAULT_MAX_TITLE_TOKENS,
    PromptEncoder,
    RowBlock,
    UnitTable,
    encode_rows,
    load_templates,
)
from llara_dist.data.rows import Rows, ranges
from llara_dist.data.samples import pack
from llara_dist.data.tokenizer import load_tokenizer, tokenizer_hash
from llara_dist.errors import InputError
from llara_dist.hashing import hash64, text_seed
from llara_dist.integrity import sha256_file, staged_folder, write_json

_PLACE = text_seed("llara_dist/shards/place")
_TEMPLATE = text_seed("llara_dist/shards/template")
_CHECKED_ROWS = 256
_BLOCK = 1024


@dataclass(frozen=True)
class Drawing:
    """What a worker needs besides its rows: the unit table and the settings of the draws."""

    table: UnitTable
    seed: int
    max_tokens: int
    touched_offsets: np.ndarray
    """int64 [users + 1]: CSR by user of all items touched, which may not be negatives"""
    touched_items: np.ndarray


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: its rows in order, and the frozen candidates where the split has them."""

    path: Path
    number: int
    pass_index: int
    rows: Rows
    candidates: np.ndarray | None


@dataclass(frozen=True)
class ShardResult:
    """One shard written."""

    index: form.Index
    bytes: int
    sha256: str
    rows_shortened: int
    history_dropped: int


def place_rows(keys: np.ndarray, seed: int, pass_index: int) -> np.ndarray:
    """The order of a pass's rows over its shards, int64 [n]: a shuffle by hash(seed, pass, key)."""
    return np.argsort(hash64(_PLACE, seed, pass_index, keys), kind="stable")


def take_rows(rows: Rows, order: np.ndarray) -> Rows:
    """The rows at the given places, in that order."""
    lengths = rows.lengths[order]
    return Rows(
        keys=rows.keys[order],
        users=rows.users[order],
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=rows.items[ranges(rows.offsets[order], lengths)],
        targets=rows.targets[order],
    )


def draw_rows(rows: Rows, candidates: np.ndarray | None, drawing: Drawing, pass_index: int) -> tuple[RowBlock, Any]:
    """Draw template and candidates of rows and encode them; returns the block and candidates int32 [n, C]."""
    table = drawing.table
    if candidates is None:
        offsets, items = row_exclusions(rows, drawing.touched_offsets, drawing.touched_items, 0, len(rows))
        candidates = draw_candidates(
            rows.keys, rows.targets, offsets, items, table.num_items, table.num_candidates, drawing.seed, pass_index
        )
    templates = draw_templates(rows.keys, drawing.seed, pass_index, table.num_templates)
    target_index = (candidates == rows.targets[:, None]).argmax(axis=1)
    block = encode_rows(
        table, rows.offsets, rows.items, candidates, target_index, templates, drawing.max_tokens, rows.keys
    )
    return block, candidates


def draw_templates(keys: np.ndarray, seed: int, pass_index: int, num_templates: int) -> np.ndarray:
    """Which wording each row gets in a pass, int64 [n]."""
    return (hash64(_TEMPLATE, seed, pass_index, keys) % np.uint64(num_templates)).astype(np.int64)


_DRAWING: Drawing | None = None


def _start_worker(drawing: Drawing) -> None:
    """Give a worker process what all its tasks share."""
    global _DRAWING
    _DRAWING = drawing
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A pool's worker waits for tasks for ever when its parent was killed: it holds both ends of the queue's pipe.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_shard_in_worker(task: ShardTask) -> ShardResult:
    assert _DRAWING is not None
    return write_shard(task, _DRAWING)


def write_shard(task: ShardTask, drawing: Drawing) -> ShardResult:
    """Encode a shard's rows and write its tar; returns its index and hash."""
    n = len(task.rows)
    offsets, sizes, crcs = np.zeros(n, np.int64), np.zeros(n, np.int32), np.zeros(n, np.uint32)
    tokens, slots, answers = np.zeros(n, np.int32), np.zeros(n, np.int32), np.zeros(n, np.int32)
    shortened = dropped = position = 0
    digest = hashlib.sha256()
    with open(task.path, "wb") as file:
        for start in range(0, n, _BLOCK):
            part = slice(start, min(start + _BLOCK, n))
            rows = take_rows(task.rows, np.arange(part.start, part.stop))
            frozen = None if task.candidates is None else task.candidates[part]
            block, _ = draw_rows(rows, frozen, drawing, task.pass_index)
            tokens[part] = np.diff(block.token_offsets)
            slots[part] = np.diff(block.slot_offsets)
            answers[part] = block.answer_end - block.answer_start
            shortened += int((block.dropped > 0).sum())
            dropped += int(block.dropped.sum())
            for row, key in enumerate(rows.keys.tolist()):
                payload = pack(block.sample(row, key, task.pass_index))
                member = form.tar_member(form.member_name(task.pass_index, key), payload)
                offsets[start + row] = position + 512
                sizes[start + row] = len(payload)
                crcs[start + row] = zlib.crc32(payload)
                file.write(member)
                digest.update(member)
                position += len(member)
        end = form.tar_end(position)
        file.write(end)
        digest.update(end)
    index = form.Index(
        keys=task.rows.keys,
        passes=np.full(n, task.pass_index, np.int16),
        shards=np.full(n, task.number, np.int32),
        offsets=offsets,
        sizes=sizes,
        tokens=tokens,
        slots=slots,
        answer_tokens=answers,
        crc32=crcs,
    )
    return ShardResult(index, position + len(end), digest.hexdigest(), shortened, dropped)


def shard_tasks(
    folder: Path, rows: Rows, candidates: np.ndarray | None, passes: int, seed: int, samples_per_shard: int
) -> Iterator[ShardTask]:
    """The shards of a split, pass after pass; a shard holds one pass only."""
    number = 0
    for pass_index in range(passes):
        order = place_rows(rows.keys, seed, pass_index)
        for start in range(0, len(order), samples_per_shard):
            part = order[start : start + samples_per_shard]
            frozen = None if candidates is None else candidates[part]
            yield ShardTask(folder / f"{number:06d}.tar", number, pass_index, take_rows(rows, part), frozen)
            number += 1


def _run(tasks: Iterator[ShardTask], drawing: Drawing, processes: int) -> Iterator[ShardResult]:
    """Write shards on so many processes; results in the order of the tasks."""
    if processes == 1:
        for task in tasks:
            yield write_shard(task, drawing)
        return
    # spawn: the parent's tokenizer and Arrow threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(drawing,)) as pool:
        waiting: deque[Future[ShardResult]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(_write_shard_in_worker, task))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RuntimeError("a worker process of the build died (out of memory?); try fewer --processes") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


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
    if Path(out).exists() and not overwrite and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise InputError(f"{out}: exists already; remove it, choose another --out, or give --overwrite true")
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
        _write_items(staging / form.ITEMS, dataset.titles, encoder.shown)
        shown = np.unique(np.array(encoder.shown), return_counts=True)[1]
        counts = {
            "titles_cut": len(encoder.cut_items),
            "titles_shared": int(shown[shown > 1].sum()),
            "longest_row_tokens": max(split["longest_row_tokens"] for split in splits.values()),
        }
        info = form.seal(
            {
                "format_version": form.FORMAT_VERSION,
                **identity,
                "tokenizer": str(tokenizer),
                "vocabulary": len(loaded),
                "counts": counts,
                "splits": splits,
                "items_bytes": (staging / form.ITEMS).stat().st_size,
                "items_sha256": sha256_file(staging / form.ITEMS),
            }
        )
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
        console.progress(_run(tasks, drawing, max(1, min(workers, number))), f"shards of {split}", total=number)
    )
    indexes = [result.index for result in results]
    manifest = form.seal(
        {
            "format_version": form.FORMAT_VERSION,
            "split": split,
            **identity,
            "passes": passes,
            "samples": sum(len(index) for index in indexes),
            "shards": [
                {
                    "name": f"{number:06d}.tar",
                    "pass": int(result.index.passes[0]),
                    "samples": len(result.index),
                    "bytes": result.bytes,
                    "sha256": result.sha256,
                }
                for number, result in enumerate(results)
            ],
            "index": form.write_index(folder / form.INDEX, indexes, dataset.info["name"]),
        }
    )
    write_json(folder / form.MANIFEST, manifest)
    return {
        "samples": manifest["samples"],
        "passes": passes,
        "shards": len(results),
        "bytes": sum(result.bytes for result in results),
        "tokens": int(sum(index.tokens.sum(dtype=np.int64) for index in indexes)),
        "longest_row_tokens": max((int(index.tokens.max()) for index in indexes), default=0),
        "rows_with_history_dropped": sum(result.rows_shortened for result in results),
        "history_items_dropped": sum(result.history_dropped for result in results),
        "hash": manifest["hash"],
    }


def _write_items(path: Path, titles: list[str], shown: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = pa.array(np.arange(len(titles), dtype=np.int32))
    table = pa.table({"item_id": ids, "title": pa.array(titles, pa.string()), "shown": pa.array(shown, pa.string())})
    pq.write_table(table, path, compression="zstd", store_schema=False)


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
