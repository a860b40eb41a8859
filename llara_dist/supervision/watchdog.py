"""The ranks of a run watch each other through files: when one dies or hangs, the others say which, and stop.

No collective is used, since a collective is what hangs. Each rank has a thread that writes the rank's status file,
looks at the next rank's file, and at how long its own main thread has made no progress. Whoever finds that the run
cannot go on watches everybody's heartbeats for a moment and writes one report; an exclusively created file decides
who does so. The report tells all the others to stop as well, with their stacks, whatever they are doing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Self

from llara_dist.distributed import World
from llara_dist.errors import EXIT_RANK_LOST, RankLostError, RequeueError, RunFailedError
from llara_dist.supervision import rank_logs
from llara_dist.supervision.diagnosis import Diagnosis
from llara_dist.supervision.heartbeat import Heartbeat, create_exclusively, replace_text, silence_s
from llara_dist.supervision.process_identity import this_process
from llara_dist.supervision.progress import Phase
from llara_dist.supervision.rank_status import (
    KILLED,
    RANKS,
    STOPPED,
    RankRecord,
    RankStatus,
    beats_per_write,
    read_status,
    write_status,
)
from llara_dist.supervision.roll_call import call_roll, speak_for_the_killed
from llara_dist.supervision.shared_place import SharedPlace, remove_abandoned_places

_LONGEST_GRACE_S = 30.0
_STACKS_SHOWN = 3
_COLLECTIVES = ("torch.distributed.distributed_c10d", "deepspeed.comm")


def may_come_from_a_lost_rank(error: BaseException) -> bool:
    """Whether a collective may have raised this error because another rank is gone.

    Gloo raises plain RuntimeErrors, torch.distributed its own subclasses. Bad input, a loss that is not finite and
    full memory are of the rank's own making.
    """
    import torch

    own = (RankLostError, RequeueError, RunFailedError, torch.OutOfMemoryError, NotImplementedError, RecursionError)
    return isinstance(error, RuntimeError) and not isinstance(error, own)


class RankMonitor:
    """Reports this rank's status while entered, and ends the process with exit code 70 when the run cannot go on.

    It is entered by the main thread after the process group was joined and left before the group is. An error that
    leaves it is looked into: where a collective raised because another rank is gone, `RankLostError` is raised in its
    place, with the original as its cause; any other error goes on as it is, and the other ranks are told of it.

    Limits: in data, forward, backward, reduce and step a rank may be without progress for `hang_timeout_s`; in the
    other phases for any time (see `Phase.is_limited`). In all of them a rank that died, failed, or gave no sign of life
    for `hang_timeout_s` ends the run, except that a checkpoint that the main thread waits for may be finished. Should
    the reporting thread itself be stuck for more than twice the limit (a file system that does not answer, a call that
    never releases Python's lock), stacks go to stderr and the process ends with exit code 1.

    Args:
        out: the run's folder, on a file system that all ranks see.
        status: what the main thread sets.
        world: where this process stands.
        token: of this start, the same on every rank; `hold_run` gives it.
        heartbeat_s: seconds between signs of life.
        hang_timeout_s: longest time without progress.
    """

    def __init__(
        self, out: Path, status: RankStatus, world: World, token: str, heartbeat_s: float, hang_timeout_s: float
    ) -> None:
        self.out = Path(out)
        self.status = status
        self._world = world
        self._token = token
        self._heartbeat_s = heartbeat_s
        self._hang_timeout_s = hang_timeout_s
        self._grace_s = min(hang_timeout_s, _LONGEST_GRACE_S)
        self._beats_per_write = beats_per_write(world.size, heartbeat_s)
        self._interval_s = heartbeat_s * self._beats_per_write
        self._silence_s = silence_s(self._interval_s)
        self._process = this_process()
        self._beats = self._writes = 0
        self._memory_mib: float | None = None
        self._leaving = False
        self._neighbour_seen: tuple[int, float] | None = None
        self._entered_at = time.monotonic()
        self._place: SharedPlace | None = None
        self._heartbeat: Heartbeat | None = None

    @property
    def report_path(self) -> Path:
        """Where the report lies once a rank was lost; its being there tells every rank to stop."""
        return self.out / RANKS / f"lost-{self._token}.txt"

    @property
    def stacks_path(self) -> Path:
        """Where this rank's stacks lie once it had to stop."""
        return self._stacks_of(self._world.rank)

    def __enter__(self) -> Self:
        folder = self.out / RANKS
        folder.mkdir(parents=True, exist_ok=True)
        self.stacks_path.unlink(missing_ok=True)
        if self._world.is_main:
            self._tidy(folder)
        remove_abandoned_places()
        with contextlib.suppress(OSError):  # without it the others know this rank's place of some seconds ago
            self._place = SharedPlace(self._token, self._world.rank)
            self.status.share(self._place)
        self._write()
        # Spread, so that the ranks of a large run do not write all at once.
        delay_s = self._heartbeat_s * (1 + self._world.rank / self._world.size)
        self._arm_backstop()
        self._heartbeat = Heartbeat(self._beat, self._heartbeat_s, delay_s, "rank monitor")
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        lost = None
        self._leaving = True
        if error is not None and self._world.size > 1 and may_come_from_a_lost_rank(error):
            self.status.touch()
            with contextlib.suppress(OSError):  # must not hide why the run ended
                lost = self._look_into()
                if lost is not None:
                    self._write_stacks(error)
        if error is not None and lost is None and not isinstance(error, RequeueError):
            with contextlib.suppress(OSError):  # this rank may be the one that failed: what it says is worth most
                self._write_stacks(error)
        if self._heartbeat is not None:
            self._heartbeat.stop()
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            self._write(STOPPED if lost is not None or isinstance(error, RankLostError) else _ending(error))
        self.status.share(None)
        if self._place is not None:
            self._place.remove()
        if lost is not None:
            raise RankLostError(lost) from error

    @property
    def _claim_path(self) -> Path:
        return self.report_path.with_suffix(".claim")

    def _stacks_of(self, rank: int) -> Path:
        return self.out / RANKS / f"stacks-{rank:05d}.txt"

    def _tidy(self, folder: Path) -> None:
        """Remove what an earlier start with more ranks left, and what it claimed; its reports stay."""
        for path in folder.glob("*-*"):
            number = path.stem.rpartition("-")[2]
            surplus = path.name.startswith(("rank-", "stacks-")) and int(number) >= self._world.size
            if surplus or (path.suffix == ".claim" and path != self._claim_path):
                path.unlink(missing_ok=True)

    def _arm_backstop(self) -> None:
        faulthandler.dump_traceback_later(2 * self._hang_timeout_s + 4 * self._silence_s, exit=True, file=2)

    def _record(self, ended: str | None = None) -> RankRecord:
        progress, changes, idle_s = self.status.read()
        # Not of a thread that hangs: it may hold the lock that the answer needs.
        if self.status.memory is not None and idle_s <= self._heartbeat_s:
            self._memory_mib = round(self.status.memory(), 1)
        return RankRecord(
            token=self._token,
            rank=self._world.rank,
            world_size=self._world.size,
            process=self._process,
            heartbeat=self._writes,
            interval_s=self._interval_s,
            progress=progress,
            changes=changes,
            idle_s=round(idle_s, 3),
            in_collective=idle_s > self._heartbeat_s and _is_in_collective(),
            ended=ended,
            written_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            total_steps=self.status.total_steps,
            cost=self.status.cost,
            memory_mib=self._memory_mib,
        )

    def _write(self, ended: str | None = None) -> None:
        self._writes += 1
        write_status(self.out, self._record(ended))

    def _beat(self) -> None:
        self._arm_backstop()
        self._beats += 1
        progress, _, idle_s = self.status.read()
        hangs = progress.phase.is_limited and idle_s > self._hang_timeout_s
        if self._beats % self._beats_per_write == 0:
            with contextlib.suppress(OSError):  # it may come back; the others see a silent rank meanwhile
                self._write()
            # An error that all ranks raise at once, and a checkpoint under way, come to their own end.
            waits = idle_s > (self._hang_timeout_s if progress.phase is Phase.CHECKPOINT else self._grace_s)
            hangs |= self._is_neighbour_gone() and waits
            if self.report_path.exists():
                hangs |= progress.phase is not Phase.CHECKPOINT or waits
        if hangs and not self._leaving:  # then the main thread looks into it, and tells what it found
            self._stop()

    def _is_neighbour_gone(self) -> bool:
        """Whether the next rank failed, died or fell silent: one file a rank, and no rank goes unseen."""
        if self._world.size == 1:
            return False
        record = read_status(self.out, (self._world.rank + 1) % self._world.size, self._token)
        now = time.monotonic()
        if record is None:  # it may have died before its first file
            return now - self._entered_at > self._hang_timeout_s
        if self._neighbour_seen is None or self._neighbour_seen[0] != record.heartbeat:
            self._neighbour_seen = (record.heartbeat, now)
        if record.ended is not None:
            return record.has_failed or record.ended == KILLED
        if record.process.is_running() is False:
            speak_for_the_killed(self.out, self._token)
            return True
        return now - self._neighbour_seen[1] > self._hang_timeout_s

    def _stop(self) -> None:
        """End this process, with stacks and a reason."""
        text = None
        try:
            self._write_stacks()
            text = self._look_into(hangs=True)
            self._write(STOPPED)
            if self._place is not None:
                self._place.remove()
        except OSError as error:
            faulthandler.dump_traceback(2, all_threads=True)
            text = text or f"no progress in {self.status.progress.place}, and the run's folder does not answer: {error}"
        finally:
            text = text or f"no progress in {self.status.progress.place}, and no rank reported why"
            with contextlib.suppress(OSError):
                os.write(2, f"rank {self._world.rank} stops: {text}\n".encode())
                rank_logs.drain()
            os._exit(EXIT_RANK_LOST)

    def _write_stacks(self, error: BaseException | None = None) -> None:
        """Every thread's stack as it is now, or where an error came from."""
        staging = self.stacks_path.with_name(f".{self.stacks_path.name}.staging")
        with open(staging, "w", encoding="utf-8") as file:
            if error is None:
                faulthandler.dump_traceback(file, all_threads=True)
            else:
                traceback.print_exception(error, file=file)
        os.replace(staging, self.stacks_path)

    def _look_into(self, hangs: bool = False) -> str | None:
        """Find out what became of the other ranks, or learn what another rank found out.

        Args:
            hangs: whether the run cannot go on even if every rank gives signs of life.

        Returns:
            On one rank the whole report, on the others its first line; None where no rank is gone.
        """
        speak_for_the_killed(self.out, self._token)
        claim = self._claim_path
        staging = claim.with_name(f".{claim.name}.{self._world.rank}.{threading.get_native_id()}.staging")
        deadline = time.monotonic() + 3 * self._silence_s
        while not self.report_path.exists() and time.monotonic() < deadline:
            if create_exclusively(claim, f"rank {self._world.rank}\n", staging):
                diagnosis = call_roll(self.out, self._record(), self._silence_s)
                if hangs or diagnosis.is_rank_gone:
                    return self._report(diagnosis)
                claim.unlink(missing_ok=True)
                return None
            self._wait_for(lambda: self.report_path.exists() or not claim.exists(), deadline)
            if not hangs and not self.report_path.exists():
                return None
        if not self.report_path.exists():
            return None
        first = self.report_path.read_text(encoding="utf-8").partition("\n")[0]
        return f"{first} (more in {self.report_path})"

    def _wait_for(self, condition: Callable[[], bool], deadline: float) -> None:
        """Wait with signs of life: whoever calls the roll meanwhile must hear this rank."""
        written = time.monotonic()
        while not condition() and time.monotonic() < deadline:
            time.sleep(self._heartbeat_s / 4)
            if time.monotonic() - written >= self._interval_s:
                self._write()
                speak_for_the_killed(self.out, self._token)
                written = time.monotonic()

    def _report(self, diagnosis: Diagnosis) -> str:
        """Write the report, which stops every other rank, and add the stacks of those who hold up the rest."""
        lines = diagnosis.lines(str(self._stacks_of(0)).replace("00000", "*"))
        staging = self.report_path.with_name(f".{self.report_path.name}.staging")
        replace_text(self.report_path, "\n".join(lines) + "\n", staging)
        ranks = [record.rank for record in diagnosis.behind or diagnosis.waiting][:_STACKS_SHOWN]
        if not diagnosis.is_rank_gone:
            deadline = time.monotonic() + self._silence_s
            self._wait_for(lambda: all(self._stacks_of(rank).exists() for rank in ranks), deadline)
            for rank in ranks:
                with contextlib.suppress(FileNotFoundError):
                    lines += [f"stacks of rank {rank}:", self._stacks_of(rank).read_text(errors="replace").rstrip()]
        return "\n".join(lines)


def _is_in_collective() -> bool:
    """Whether a thread of this process stands in a collective: NCCL's are asynchronous, gloo's and DeepSpeed's seen."""
    for top in sys._current_frames().values():
        frame = top
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith(_COLLECTIVES):
                return True
            frame = frame.f_back
    return False


def _ending(error: BaseException | None) -> str:
    if error is None or isinstance(error, RequeueError):
        return ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")
