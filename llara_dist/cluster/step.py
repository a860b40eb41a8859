"""One `srun` of a job: a command over its tasks, told to stop when the batch step is, ended when it is stuck."""

from __future__ import annotations

import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from llara_dist.cluster.site import Site
from llara_dist.console import say
from llara_dist.errors import EXIT_RANK_LOST
from llara_dist.supervision.heartbeat import silence_s
from llara_dist.supervision.rank_status import RANKS, read_statuses
from llara_dist.supervision.stop_signals import STOP_SIGNALS

_ON_EVERY_TASK = frozenset({"train", "evaluate"})
_LONGEST_LAST_SAVE_S = 900
"""So long the first rank may go on alone, e.g. to write its last checkpoint, before srun ends it."""
_LINGER_S = 30.0
"""So long, and two silences, after the ranks' report of a lost one none gives a sign of life before srun is ended."""
_LOOK_S = 1.0


def step_command(command: Sequence[str], site: Site, environment: Mapping[str, str]) -> list[str]:
    """srun's argument vector for a command of `llara-dist`; every word of it reaches the program unchanged.

    Args:
        command: its words.
        site: set-up lines, container, interpreter, further options of srun.
        environment: the job's.
    """
    # A rank of a run that ends badly is left to the others, who find out why and stop; elsewhere nobody watches.
    options = ["--export=ALL", f"--kill-on-bad-exit={int(command[0] != 'train')}", f"--wait={_LONGEST_LAST_SAVE_S}"]
    if command[0] not in _ON_EVERY_TASK:
        options += ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]
    if "SLURM_CPUS_PER_TASK" in environment:  # since Slurm 22.05 a step does not inherit it: one core a rank
        options.append(f"--cpus-per-task={environment['SLURM_CPUS_PER_TASK']}")
    options += site.srun
    if site.container.image:
        options.append(f"--container-image={site.container.image}")
    if site.container.mounts:
        options.append(f"--container-mounts={','.join(site.container.mounts)}")
    variables = [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    script = "\n".join([*variables, *site.setup, 'exec "$@"'])
    program = [*site.container.command, site.python, "-m", "llara_dist.cli", *command]
    return ["srun", *options, "bash", "-c", script, "llara-dist", *program]


class Step:
    """A command that runs over the job's tasks.

    Attributes:
        asked: whether the tasks were told to stop.

    Args:
        words: srun's argument vector.
        out: of a run that listens to stop signals and watches its ranks; None = neither.
    """

    def __init__(self, words: Sequence[str], out: Path | None) -> None:
        self.asked = False
        self._out = out
        self._reports = self._lost_reports()
        self._heartbeats: list[int] = []
        self._moved_at = time.monotonic()
        for number in STOP_SIGNALS:
            signal.signal(number, self._forward)
        self._srun = subprocess.Popen(words)

    def wait(self) -> int:
        """Wait until it has ended; returns srun's exit code, 70 where srun had to be ended.

        srun waits for a node that died until Slurm calls it down, five minutes by default, while the ranks of the
        other nodes have long found out and stopped.
        """
        while True:
            try:
                return self._srun.wait(_LOOK_S)
            except subprocess.TimeoutExpired:
                if self._is_stuck():
                    break
        say("llara-dist: a rank is lost and the others have stopped, but srun still waits for it; it is ended")
        self._srun.terminate()
        try:
            self._srun.wait(_LINGER_S)
        except subprocess.TimeoutExpired:
            self._srun.kill()
            self._srun.wait()
        return EXIT_RANK_LOST

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Tell the ranks to save and stop; SIGUSR1 in any case, since on SIGTERM srun would end them instead."""
        if self._out is not None:
            self.asked = True
            self._srun.send_signal(signal.SIGUSR1)

    def _lost_reports(self) -> set[Path]:
        return set() if self._out is None else set((self._out / RANKS).glob("lost-*.txt"))

    def _is_stuck(self) -> bool:
        """Whether ranks have reported a lost one, and none of them gave a sign of life since."""
        if self._out is None or self._lost_reports() <= self._reports:
            return False
        records = read_statuses(self._out)
        heartbeats = [record.heartbeat for record in records]
        if heartbeats != self._heartbeats:
            self._heartbeats, self._moved_at = heartbeats, time.monotonic()
        interval_s = max((record.interval_s for record in records), default=0.0)
        return time.monotonic() - self._moved_at > _LINGER_S + 2 * silence_s(interval_s)
