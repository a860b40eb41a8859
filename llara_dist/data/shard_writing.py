"""Which rows make which shard, what is drawn for them, and the writing of a shard by any number of processes.

Which row lies where is a pure function of (seed, pass, key): a global shuffle inside each pass, so that one user's
windows do not lie together. A shard is made by one process from arrays alone; no tokenizer is needed there.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist.data import shards as form
from llara_dist.data.candidates import draw_candidates
from llara_dist.data.exclusions import row_exclusions
from llara_dist.data.rows import Rows, ranges
from llara_dist.data.samples import pack
from llara_dist.data.shard_index import ShardIndex
from llara_dist.data.units import RowBlock, UnitTable, encode_rows
from llara_dist.hashing import hash64, text_seed

_PLACE = text_seed("llara_dist/shards/place")
_TEMPLATE = text_seed("llara_dist/shards/template")
_BLOCK = 1024
"""rows encoded at once"""


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

    pass_index: int
    index: ShardIndex
    bytes: int
    sha256: str
    rows_shortened: int
    history_dropped: int

    def entry(self) -> dict[str, Any]:
        """What the manifest says of the shard, besides its name."""
        return {
            "pass": self.pass_index,
            "samples": len(self.index),
            "bytes": self.bytes,
            "sha256": self.sha256,
        }


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


def draw_rows(
    rows: Rows, candidates: np.ndarray | None, drawing: Drawing, pass_index: int
) -> tuple[RowBlock, np.ndarray]:
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
    index = ShardIndex(
        keys=task.rows.keys,
        offsets=offsets,
        sizes=sizes,
        tokens=tokens,
        slots=slots,
        answer_tokens=answers,
        crc32=crcs,
    )
    return ShardResult(task.pass_index, index, position + len(end), digest.hexdigest(), shortened, dropped)


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
            yield ShardTask(folder / form.shard_name(number), number, pass_index, take_rows(rows, part), frozen)
            number += 1


def write_shards(tasks: Iterator[ShardTask], drawing: Drawing, processes: int) -> Iterator[ShardResult]:
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
