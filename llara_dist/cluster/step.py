"""One `srun` of a job: a command over its tasks, told to stop when the batch step is, ended when it is stuck."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from llara_dist.cluster.site import Site
from llara_dist.console import say
from llara_dist.distributed import Job
from llara_dist.errors import EXIT_RANK_LOST
from llara_dist.supervision.early_end import EarlyEnd, early_paths, early_prefix, read_early_ends
from llara_dist.supervision.heartbeat import silence_s
from llara_dist.supervision.rank_status import RANKS, read_statuses
from llara_dist.supervision.stop_signals import STOP_SIGNALS

_ON_EVERY_TASK = frozenset({"train", "evaluate"})
_LONGEST_LAST_SAVE_S = 900
"""So long the first rank may go on alone, e.g. to write its last checkpoint, before srun ends it."""
_LINGER_S = 30.0
"""So long, and two silences, after the ranks' report of a lost one none gives a sign of life before srun is ended.

So long, too, after the last rank that ended before the run began: the others of a whole cluster find the same by then.
"""
_LOOK_S = 1.0
_NAMED = 8
"""At most so many ranks are named."""
_VALUE = "LLARA_DIST_SITE_VALUE_"
"""Begins the names under which the values of the site's variables travel."""
_EARLY = "LLARA_DIST_EARLY_END"
"""Names the variable with what the names of early ends' files begin with."""
# What `supervision.early_end` writes, where the program does not even start: neither set-up nor exec came to an end.
_TELL_EARLY_END = f"""\
llara_dist_early_end() {{
    local code=$? path="${_EARLY}$(printf %05d "$SLURM_PROCID").json"
    local message="the site's set-up or the interpreter failed" host="${{SLURMD_NODENAME:-$HOSTNAME}}"
    trap - EXIT
    [ "$code" != 0 ] && mkdir -p "${{path%/*}}" &&
        printf '{{"rank": %d, "world_size": %d, "host": "%s", "code": %d, "everywhere": false, "message": "%s"}}\\n' \
            "$SLURM_PROCID" "$SLURM_NTASKS" "$host" "$code" "$message" >"$path.staging" &&
        mv "$path.staging" "$path"
    exit "$code"
}}
trap llara_dist_early_end EXIT
shopt -s execfail"""


def step_environment(site: Site, environment: Mapping[str, str], out: Path | None, job: Job) -> dict[str, str]:
    """srun's environment: the job's, and what the script of `step_command` finds there.

    Args:
        site: its variables' values may be secrets, and a command line can be read by everybody on the node.
        environment: the job's.
        out: of a run that watches its ranks; None = it does not.
        job: that this is.
    """
    values = {f"{_VALUE}{place}": value for place, value in enumerate(site.environment.values())}
    early = {} if out is None else {_EARLY: os.path.abspath(early_prefix(out, job))}
    return {**environment, **values, **early}


def step_command(command: Sequence[str], site: Site, environment: Mapping[str, str]) -> list[str]:
    """srun's argument vector for a command of `llara-dist`; every word of it reaches the program unchanged.

    Args:
        command: its words.
        site: set-up lines, container, interpreter, further options of srun.
        environment: as `step_environment` gives it.
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
    lines, end = ([_TELL_EARLY_END], ["llara_dist_early_end"]) if _EARLY in environment else ([], [])
    for place, name in enumerate(site.environment):
        # Whoever lets srun pass less than all on must pass these on as well.
        given = f"{_VALUE}{place}"
        lines.append(f'[ "${{{given}+set}}" ] || {{ echo "error: {given}: srun did not pass it on" >&2; exit 2; }}')
        lines.append(f'export {name}="${given}"; unset {given}')
    script = "\n".join([*lines, *site.setup, 'exec "$@"', *end])
    program = [*site.container.command, site.python, "-m", "llara_dist.cli", *command]
    return ["srun", *options, "bash", "-c", script, "llara-dist", *program]


class Step:
    """A command that runs over the job's tasks.

    Attributes:
        asked: whether the tasks were told to stop.

    Args:
        words: srun's argument vector.
        environment: srun's.
        out: of a run that listens to stop signals and watches its ranks; None = neither.
        job: that this is a step of.

    Raises:
        OSError: there is no srun.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], out: Path | None, job: Job) -> None:
        self.asked = False
        self._out, self._job = out, job
        self._reports = self._lost_reports()
        # An earlier step of the same start may have left some.
        self._early_before = self._early_seen = self._early_paths()
        self._early: list[EarlyEnd] | None = None
        self._heartbeats: list[int] = []
        self._moved_at = time.monotonic()
        self._srun: subprocess.Popen[bytes] | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._forward)
        srun = self._srun = subprocess.Popen(words, env=environment)
        if self.asked:  # before there was anybody to tell; twice does no harm
            srun.send_signal(signal.SIGUSR1)

    def wait(self) -> int:
        """Wait until it has ended; returns srun's exit code.

        srun is ended where it waits in vain, and the code is 70, or that of the ranks which ended early: it waits for
        a node that died until Slurm calls it down, five minutes by default, while the ranks of the other nodes have
        long found out and stopped; and for ranks that want to be joined by one that ended before the run began.
        """
        srun = self._srun
        assert srun is not None
        while True:
            try:
                return srun.wait(_LOOK_S)
            except subprocess.TimeoutExpired:
                if self._is_stuck():
                    say("llara-dist: a rank is lost and the others have stopped; srun still waits for it and is ended")
                    code = EXIT_RANK_LOST
                    break
                if self._waits_for_early_ends():
                    code = self._say_early_ends()
                    break
        srun.terminate()
        try:
            srun.wait(_LINGER_S)
        except subprocess.TimeoutExpired:
            srun.kill()
            srun.wait()
        return code

    def early_ends(self) -> list[EarlyEnd]:
        """The ranks that ended before the run began, in their order, as far as they said so."""
        if self._early is not None:
            return self._early
        return read_early_ends(self._early_paths() - self._early_before)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Tell the ranks to save and stop; SIGUSR1 in any case, since on SIGTERM srun would end them instead."""
        if self._out is not None:
            self.asked = True
            if self._srun is not None:
                self._srun.send_signal(signal.SIGUSR1)

    def _lost_reports(self) -> set[Path]:
        return set() if self._out is None else set((self._out / RANKS).glob("lost-*.txt"))

    def _say_early_ends(self) -> int:
        """Name the ranks that the others wait for; returns the highest of their exit codes."""
        self._early = ends = self.early_ends()  # those who are ended now may say so too
        for end in ends[:_NAMED]:
            say(f"llara-dist: rank {end.rank} on {end.host} ended before the run began: {end.message}")
        say(f"llara-dist: {len(ends)} ranks ended so; srun, which waits for the others, is ended")
        return max((end.code for end in ends), default=EXIT_RANK_LOST)

    def _early_paths(self) -> set[Path]:
        return set() if self._out is None else early_paths(self._out, self._job)

    def _waits_for_early_ends(self) -> bool:
        """Whether ranks have ended before the run began, and no more of them lately."""
        seen = self._early_paths()
        if seen != self._early_seen:
            self._early_seen, self._moved_at = seen, time.monotonic()
        return not seen <= self._early_before and time.monotonic() - self._moved_at > _LINGER_S

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
