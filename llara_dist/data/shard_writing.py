"""The writing of shards by any number of processes: each is made by one process from arrays alone, no tokenizer."""

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
from llara_dist.data.drawing import Drawing, draw_rows
from llara_dist.data.placement import ShardRows
from llara_dist.data.rows import Rows
from llara_dist.data.samples import pack
from llara_dist.data.shard_index import ShardIndex

_BLOCK = 1024
"""rows encoded at once"""


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: its rows in order, and the frozen candidates where the split has them."""

    path: Path
    pass_index: int
    rows: Rows
    candidates: np.ndarray | None


@dataclass(frozen=True)
class ShardResult:
    """One shard written."""

    name: str
    pass_index: int
    index: ShardIndex
    bytes: int
    sha256: str
    rows_shortened: int
    history_dropped: int

    def entry(self) -> dict[str, Any]:
        """What the manifest says of the shard."""
        return {
            "name": self.name,
            "pass": self.pass_index,
            "samples": len(self.index),
            "bytes": self.bytes,
            "sha256": self.sha256,
        }


_DRAWING: Drawing | None = None


def _start_worker(drawing: Path) -> None:
    """Give a worker process what all its tasks share."""
    global _DRAWING
    _DRAWING = Drawing.open(drawing)
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
            rows = task.rows.chunk(part.start, part.stop)
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
    return ShardResult(
        task.path.name, task.pass_index, index, position + len(end), digest.hexdigest(), shortened, dropped
    )


def shard_tasks(
    folder: Path, shards: Iterator[ShardRows], candidates: np.ndarray | None, first_key: int
) -> Iterator[ShardTask]:
    """What is to be written into a split's folder; frozen candidates are those of the keys from `first_key`."""
    for shard in shards:
        frozen = None if candidates is None else candidates[shard.rows.keys.astype(np.int64) - first_key]
        yield ShardTask(folder / form.shard_name(shard.number), shard.pass_index, shard.rows, frozen)


def write_shards(tasks: Iterator[ShardTask], drawing: Path, processes: int) -> Iterator[ShardResult]:
    """Write shards on so many processes; results in the order of the tasks.

    Args:
        tasks: what to write.
        drawing: folder of a saved `Drawing`.
        processes: how many; 1 is the calling one.
    """
    if processes == 1:
        opened = Drawing.open(drawing)
        for task in tasks:
            yield write_shard(task, opened)
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
