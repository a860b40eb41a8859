"""The lock of a run's folder: one job at a time, on any host, without trust in clocks.

Each holder has a file of its own, OUT/lock-000007.json; the one with the highest number holds the run. Who takes over
creates the next number, which succeeds for exactly one of any number of racers, and nobody ever writes another's
file: a holder that was suspended and wakes up cannot overwrite its successor, it finds the higher number. The file
carries a heartbeat, a counter: whether it still moves is seen by watching, not by comparing times of two hosts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from llara_dist.distributed import Job, World, of_main, read_job
from llara_dist.errors import InputError
from llara_dist.supervision.heartbeat import Heartbeat, create_exclusively, replace_text, silence_s
from llara_dist.supervision.process_identity import ProcessIdentity, this_process

_NAME = re.compile(r"lock-(\d+)\.json")


@dataclass(frozen=True)
class LockRecord:
    """What a lock file says.

    Attributes:
        token: of this holding; also names the start to the other ranks.
        job: of the holder.
        process: the holder, rank 0 of the run.
        taken_at: when the lock was taken, local time with zone, for people.
        heartbeat: counts up while the holder lives.
        heartbeat_at: when it last did, for people.
        heartbeat_s: how often it does.
        released: whether the holder has ended in order.
    """

    token: str
    job: Job
    process: ProcessIdentity
    taken_at: str
    heartbeat: int
    heartbeat_at: str
    heartbeat_s: float
    released: bool

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @property
    def holder(self) -> str:
        """The holder as messages name it."""
        job = f"job {self.job.name} (restart {self.job.restart})" if self.job.name else "a run without a job id"
        return f"{job} on {self.process.host}, pid {self.process.pid}"


def parse_lock(text: str) -> LockRecord | None:
    """A lock file's record; None where the text is none: written on a file system that lost it, or by hand."""
    try:
        values = json.loads(text)
        job, process = Job(**values.pop("job")), ProcessIdentity(**values.pop("process"))
        record = LockRecord(**values, job=job, process=process)
        return dataclasses.replace(record, heartbeat_s=float(record.heartbeat_s))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def is_free(record: LockRecord, job: Job, running: bool | None) -> bool:
    """Whether a lock may be taken at once, without watching its heartbeat.

    Args:
        record: the newest lock file.
        job: who asks.
        running: whether the holder's process lives, None = not known from here.
    """
    requeued = record.job.name == job.name != "" and record.job.restart < job.restart
    return record.released or running is False or requeued


class RunLock:
    """The lock of one run's folder, held between `with` and its end; rank 0 only.

    Attributes:
        lost: None, or why this process holds the run no more: nothing may be written into OUT from then on.

    Args:
        out: the run's folder; made if missing.
        job: of this process.
        heartbeat_s: seconds between signs of life.
    """

    def __init__(self, out: Path, job: Job, heartbeat_s: float) -> None:
        self.out = Path(out)
        self.lost: str | None = None
        now = _now()
        self._record = LockRecord(
            token=secrets.token_hex(8),
            job=job,
            process=this_process(),
            taken_at=now,
            heartbeat=0,
            heartbeat_at=now,
            heartbeat_s=heartbeat_s,
            released=False,
        )
        self._number = 0
        self._complained = False
        self._heartbeat: Heartbeat | None = None

    @property
    def token(self) -> str:
        """Names this holding, and no other ever."""
        return self._record.token

    @property
    def path(self) -> Path:
        """This holder's lock file."""
        return self._file(self._number)

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            InputError: another job works here: its heartbeat moves.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        while not self._take(self._numbers()):
            pass  # another one did something in between: look again
        self._heartbeat = Heartbeat(self._renew, self._record.heartbeat_s, self._record.heartbeat_s, "run lock")
        return self

    def __exit__(self, *exception: object) -> None:
        """Release the lock, if it is still held."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
        with contextlib.suppress(OSError):  # a file system that is gone must not hide why the run ended
            if self._still_held():
                self._write(released=True)

    def check(self) -> None:
        """Look now, e.g. before a checkpoint gets its name, whether this process still holds the run.

        Raises:
            InputError: it does not.
            OSError: the file system does not answer.
        """
        if not self._still_held():
            raise InputError(str(self.lost), everywhere=False)

    def _file(self, number: int) -> Path:
        return self.out / f"lock-{number:06d}.json"

    @property
    def _staging(self) -> Path:
        return self.out / f".lock.{self.token}.staging"

    def _numbers(self) -> list[int]:
        matches = (_NAME.fullmatch(path.name) for path in self.out.iterdir())
        return sorted(int(match[1]) for match in matches if match is not None)

    def _take(self, numbers: list[int]) -> bool:
        """One attempt; False where the folder changed meanwhile."""
        newest = numbers[-1] if numbers else 0
        if newest:
            try:
                self._require_free(newest)
            except FileNotFoundError:
                return False
        self._number = newest + 1
        if not create_exclusively(self.path, self._record.to_json(), self._staging):
            return False
        # The number may have been used and tidied away while this process was slow.
        if self._numbers()[-1:] != [self._number]:
            self.path.unlink(missing_ok=True)
            return False
        for number in numbers[:-1]:  # the last one stays: it tells who worked here before
            self._file(number).unlink(missing_ok=True)
        return True

    def _require_free(self, number: int) -> None:
        """Return once lock `number` may be taken over: at once, or when its heartbeat stood still while watched.

        Raises:
            InputError: its heartbeat moves.
            FileNotFoundError: it is gone.
        """
        path = self._file(number)
        text = path.read_text(encoding="utf-8", errors="replace")
        record = parse_lock(text)
        if record is not None and is_free(record, self._record.job, record.process.is_running()):
            return
        heartbeat_s = self._record.heartbeat_s if record is None else record.heartbeat_s
        seen = time.monotonic()
        while time.monotonic() < seen + silence_s(heartbeat_s):
            time.sleep(min(heartbeat_s / 4, 1.0))
            now = path.read_text(encoding="utf-8", errors="replace")
            if now != text:
                record = parse_lock(now)
                if record is not None and record.released:
                    return
                holder = "another run" if record is None else record.holder
                raise InputError(
                    f"{self.out}: {holder} works in this folder, its last heartbeat is less than "
                    f"{time.monotonic() - seen:.1f} s old; choose another --out, or wait until it has ended, or end it "
                    f"(only if it is surely gone: remove {path})"
                )

    def _still_held(self) -> bool:
        if self.lost is None:
            self.lost = self._why_lost()
        return self.lost is None

    def _why_lost(self) -> str | None:
        newer = [number for number in self._numbers() if number > self._number]
        advice = "this run stops without writing anything more"
        if newer:
            try:
                record = parse_lock(self._file(newer[-1]).read_text(encoding="utf-8"))
            except FileNotFoundError:
                record = None
            taker = "another run" if record is None else record.holder
            return f"{self.out}: {taker} took this run over while this process gave no sign of life; {advice}"
        try:
            record = parse_lock(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return f"{self.path}: removed while the run held it; {advice}"
        if record is not None and record.token != self.token:
            return f"{self.path}: replaced by another run's; {advice}"
        return None

    def _write(self, released: bool = False) -> None:
        self._record = dataclasses.replace(
            self._record, heartbeat=self._record.heartbeat + 1, heartbeat_at=_now(), released=released
        )
        replace_text(self.path, self._record.to_json(), self._staging)

    def _renew(self) -> None:
        try:
            if self._still_held():
                self._write()
        except OSError as error:  # it may come back; if somebody takes the run meanwhile, `_still_held` finds out
            if not self._complained:
                print(f"{self.path}: the heartbeat cannot be written: {error}", file=sys.stderr, flush=True)
            self._complained = True


@dataclass(frozen=True)
class HeldRun:
    """What every rank knows of the run's lock.

    Attributes:
        token: names this start of the run to all its ranks.
        lock: on rank 0, else None.
    """

    token: str
    lock: RunLock | None

    @property
    def lost(self) -> str | None:
        """On rank 0 why the run is held no more; always None on the others."""
        return None if self.lock is None else self.lock.lost

    def check(self) -> None:
        """Look now whether the run is still held; does nothing on other ranks than 0.

        Raises:
            InputError: it is not.
        """
        if self.lock is not None:
            self.lock.check()


@contextlib.contextmanager
def hold_run(out: Path, heartbeat_s: float, world: World, job: Job | None = None) -> Iterator[HeldRun]:
    """Hold a run's folder: rank 0 takes the lock, every rank learns how it went; a collective.

    Args:
        out: the run's folder; nothing may be written into it before.
        heartbeat_s: seconds between signs of life.
        world: the process group is joined already.
        job: of this process; None = as the environment says.

    Raises:
        InputError: on every rank: another job works in the folder, or rank 0 cannot write there.
    """
    with contextlib.ExitStack() as stack:
        lock: RunLock | None = None
        token = refusal = ""
        if world.is_main:
            try:
                lock = stack.enter_context(RunLock(out, read_job() if job is None else job, heartbeat_s))
                token = lock.token
            except InputError as error:
                refusal = str(error)
            except OSError as error:
                refusal = f"{error.filename or out}: {error.strerror or error}"
        token, refusal = of_main((token, refusal))
        if refusal:
            raise InputError(refusal)
        yield HeldRun(token, lock)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
