"""Checkpoints written beside the steps: the run waits for a copy in memory, not for the disk.

A save gathers parameters and moments on the main rank (a collective) and hands them to one thread, which writes,
hashes, syncs, renames and rotates. The next save first waits for it, so that there is never more than one copy.

What the disk refuses is no reason to stop a run that may yet be saved: the half-written folder goes, the older
checkpoints stay, one line says what is missing, and the next save tries again. Only a save that must not fail, the last
of a run or one before it stops on request, ends the command.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from llara_dist import distributed
from llara_dist.console import say
from llara_dist.errors import InputError
from llara_dist.integrity import fsync_folder, staged_folder
from llara_dist.training.checkpoints.best import BEST, read_best, write_best
from llara_dist.training.checkpoints.folders import MARKER, checkpoint_folders, checkpoint_path, newest_step
from llara_dist.training.checkpoints.snapshot import Snapshot, take_snapshot, write_snapshot
from llara_dist.training.engine import Engine
from llara_dist.training.scores import ValidationScores

_MIB = 1 << 20
_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room within your quota there",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
}


@dataclass(frozen=True)
class SaveTimes:
    """How long a save held up the steps on this rank.

    Attributes:
        blocked_s: all of it, in seconds.
        waited_s: of it, for the write before this one; 0 on other ranks than the main one.
    """

    blocked_s: float
    waited_s: float


@dataclass(frozen=True)
class Written:
    """How one write ended.

    Attributes:
        step: of the checkpoint.
        bytes: what it takes on disk, about.
        seconds: from its beginning to its end, beside the steps.
        problem: why there is no checkpoint and what to do, one line; None where there is one.
    """

    step: int
    bytes: int
    seconds: float
    problem: str | None


class CheckpointWriter:
    """Saves a run; every rank has one and calls the same methods in the same order.

    Nobody else may write into the folder: the run's lock sees to that. Leaving the `with` block waits for the write
    under way, without a word to other ranks, so that it may be left by an exception.

    Args:
        folder: the run's `checkpoints` folder.
        keep_last: how many complete checkpoints stay; the best stays beside them.
        asynchronous: write in the background; false = every save waits for its own write.
        write: fills a staging folder from a snapshot.
        may_write: raises InputError where the folder is another run's by now; asked before anything is removed, named
            or replaced, since this process may have been suspended in between.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        asynchronous: bool = True,
        write: Callable[[Path, Snapshot], None] = write_snapshot,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self._write_folder = write
        self._may_write = may_write
        # Its thread starts with the first write, and the interpreter waits for it before it exits.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[Written] | None = None
        self._ended: list[Written] = []
        self._last: Written | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        try:
            self._settle()
        except Exception as failure:  # whatever it is, it must not hide the error that ends the run
            if error is None:
                raise
            error.add_note(f"The writer of checkpoints failed as well: {failure!r}")

    def save(
        self, engine: Engine, state: dict[str, Any], best: ValidationScores | None = None, required: bool = False
    ) -> SaveTimes:
        """Save the run as it is now; every rank calls it.

        Args:
            engine: whose trainable parameters and moments are saved.
            state: what state.json says beside the format version; `step` names the folder.
            best: this step's scores, where no validation before gave a better one.
            required: the run ends here: wait for the write, on every rank, and fail where it failed.

        Returns:
            How long the step was held up.

        Raises:
            InputError: `required`, and it could not be written.
        """
        started = time.perf_counter()
        self._settle()
        waited = time.perf_counter() - started
        snapshot = take_snapshot(engine, state)
        if snapshot is not None:
            self.write(snapshot, best, required)
        if not self.asynchronous:
            self._settle()
        if required:
            self.wait()
        return SaveTimes(blocked_s=time.perf_counter() - started, waited_s=waited)

    def write(self, snapshot: Snapshot, best: ValidationScores | None = None, required: bool = False) -> None:
        """Begin to write a snapshot in the background, on the main rank, once the write before it has ended."""
        self._settle()
        self._under_way = self._thread.submit(self._write, snapshot, best, required)

    def wait(self) -> None:
        """Wait until everything is written; every rank calls it.

        Raises:
            InputError: the last save could not be written; on every rank.
        """
        self._settle()
        problem = None if self._last is None else self._last.problem
        problem = distributed.of_main(problem)
        if problem is not None:
            raise InputError(f"{problem}; then start again with --resume auto")

    def ended(self) -> list[Written]:
        """The writes that ended since this was last asked, for the log; on other ranks than the main one none."""
        if self._under_way is not None and self._under_way.done():
            self._settle()
        ended, self._ended = self._ended, []
        return ended

    def _settle(self) -> None:
        """Wait for the write under way; whatever is no matter of the disk is raised here."""
        if self._under_way is None:
            return
        future, self._under_way = self._under_way, None
        self._last = future.result()
        self._ended.append(self._last)

    def _write(self, snapshot: Snapshot, best: ValidationScores | None, required: bool) -> Written:
        """What the thread does; its only message to the run is what it returns or raises."""
        started = time.perf_counter()
        path = checkpoint_path(self.folder, snapshot.step)
        problem = None
        try:
            self._may_write()
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            free = free_bytes(self.folder)
            if free is not None and free < snapshot.bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with staged_folder(path, replace=True) as staging:
                self._write_folder(staging, snapshot)
                self._may_write()
        except InputError as error:
            problem = str(error)
        except (OSError, SafetensorError) as error:
            problem = self._explain(error, snapshot)
            if not required:
                say(f"{problem}; the run goes on and tries again at its next checkpoint")
        else:
            self._tidy(path, best)
        return Written(snapshot.step, snapshot.bytes, time.perf_counter() - started, problem)

    def _tidy(self, path: Path, best: ValidationScores | None) -> None:
        """Name the best and drop what is too old, in this order; the new checkpoint is safe whatever happens here."""
        try:
            self._may_write()
            if best is not None:
                write_best(self.folder, best)
            rotate(self.folder, path, self.keep_last)
        except (OSError, InputError) as error:
            say(f"{path}: saved, but {BEST} or older checkpoints could not be brought up to date ({error})")

    def _explain(self, error: Exception, snapshot: Snapshot) -> str:
        safe = newest_step(self.folder)
        free = free_bytes(self.folder)
        number = _error_number(error)
        return (
            f"{self.folder}: the checkpoint of step {snapshot.step} was not written "
            f"({os.strerror(number) if number else error}): it needs {snapshot.bytes / _MIB:,.1f} MiB, "
            + ("how many are free is not known; " if free is None else f"{free / _MIB:,.1f} MiB are free; ")
            + ("nothing is saved yet" if safe is None else f"the run is safe up to step {safe}")
            + f"; {_REMEDIES.get(number, 'look after that file system')}"
        )


def rotate(folder: Path, newest: Path, keep_last: int) -> None:
    """Keep the checkpoint just written, the newest complete ones before it, and the best; remove all else.

    What lies after it was passed over as damaged when this run resumed; so was a best checkpoint that lies there, which
    is first unnamed. Hidden folders are left from killed writers.

    Args:
        folder: the run's `checkpoints` folder.
        newest: the checkpoint just written; it always stays.
        keep_last: how many complete checkpoints stay, `newest` included, the best not counted.
    """
    older = [path for path in checkpoint_folders(folder) if path < newest and (path / MARKER).is_file()]
    kept = {newest, *older[::-1][: keep_last - 1]}
    best = read_best(folder)
    if best is not None:
        path = checkpoint_path(folder, best.step)
        if path > newest:
            (folder / BEST).unlink()
            fsync_folder(folder)
        else:
            kept.add(path)
    for path in checkpoint_folders(folder):
        if path not in kept:
            os.replace(path, path.with_name(f".{path.name}.removed"))  # half-removed it would look damaged
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left half-written or half-removed, on whatever machine: by the lock we are alone."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)
    for path in folder.glob(f".{BEST}.*.staging"):
        path.unlink()


def free_bytes(folder: Path) -> int | None:
    """What this user may still write into a folder's file system; None where that does not answer."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _error_number(error: Exception) -> int:
    """Which error of the operating system it was; safetensors tells it in words only. 0 = none known."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0
