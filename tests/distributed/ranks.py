"""Run a function on several gloo ranks: file rendezvous, no port, a hard time limit."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llara_dist.distributed import end_process


def _enter(function: Callable[..., Any], rank: int, size: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LLARA_DIST_INIT_METHOD=f"file://{folder}/rendezvous",
        GLOO_SOCKET_IFNAME="lo",
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
    )
    try:
        import torch

        torch.set_num_threads(1)
        function(*arguments)
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        raise
    end_process(0)  # as a rank of a run ends


def run_ranks(function: Callable[..., Any], size: int, folder: Path, *arguments: Any, timeout_s: float = 600.0) -> None:
    """Call `function(*arguments)` in `size` processes that see each other as ranks; raise if any fails.

    Args:
        function: importable by name.
        size: number of ranks.
        folder: for the rendezvous file and the ranks' error texts; made here.
        arguments: picklable.
        timeout_s: after so long every rank is killed.
    """
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_enter, args=(function, r, size, folder, arguments)) for r in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_s
    try:
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
            if any(process.exitcode not in (None, 0) for process in processes):
                time.sleep(1.0)  # the others' own errors
                break
        alive = [process for process in processes if process.is_alive()]
    finally:
        for process in processes:
            process.kill()
            process.join()
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("error-*.txt")))
    assert not errors, errors
    codes = [None if process in alive else process.exitcode for process in processes]
    assert codes == [0] * size, f"exit codes {codes}; None: still ran after {timeout_s} s or 1 s after another failed"
