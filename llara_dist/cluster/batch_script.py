"""A job described → the text of its batch script and sbatch's options; nothing is run or written here.

sbatch reads quotes and backslashes of `#SBATCH` lines in a way of its own, variables such as SBATCH_PARTITION override
these lines, and a path's `%` is a pattern to it. So every option goes on sbatch's command line, where it arrives as it
is and overrides everything; those that a plain line can hold are in the script as well, for who submits it by hand.
"""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llara_dist.cluster import site as site_file
from llara_dist.cluster.site import Site
from llara_dist.errors import InputError

INDEX = "{index}"
"""In an array's command and paths: the task's index."""
SCRIPT = "job.sbatch"
_PLAIN = re.compile(r"[A-Za-z0-9_./:,@%+=-]*")
_UNSAYABLE = re.compile("[\n\0\ud800-\udfff]")
"""Also surrogates: bytes of a path that are no UTF-8."""
_RUNS = frozenset({"train", "evaluate"})
"""Commands that every task of the job runs."""


@dataclass(frozen=True)
class Resources:
    """What a job asks for; "" or 0 = the site's choice, else Slurm's.

    Attributes:
        nodes: how many; also as a range, "2-4", from which the job may be started.
        gpus_per_node: and processes on each node.
        cpus_per_task: cores of a process.
        mem: memory of each node, e.g. 200G.
        time: limit, as Slurm writes it: minutes, H:M:S or D-H:M:S.
        partition: and account, qos, constraint: as in the site file, which they override.
    """

    nodes: str = "1"
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    mem: str = ""
    time: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d{0,5}(-[1-9]\d{0,5})?", self.nodes):
            raise InputError(f"nodes={self.nodes}: must be a number from 1 on, or a range such as 2-4")
        low, _, high = self.nodes.partition("-")
        if high and int(high) < int(low):
            raise InputError(f"nodes={self.nodes}: the range ends before it begins")
        for name in ("gpus_per_node", "cpus_per_task"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)}: must not be negative")
        if self.time and not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time):
            raise InputError(f"time={self.time}: must be minutes, hours:minutes:seconds or days-hours:minutes:seconds")

    @property
    def most_nodes(self) -> int:
        """The upper end of `nodes`."""
        return int(self.nodes.partition("-")[2] or self.nodes)

    @property
    def tasks_per_node(self) -> int:
        """Processes on each node: one a GPU."""
        return max(1, self.gpus_per_node)


@dataclass(frozen=True)
class JobDescription:
    """One job, or an array of them.

    Attributes:
        name: shown by squeue; what is not plain in it becomes "_".
        command: words after `llara-dist`; an array's may hold {index}.
        folder: absolute, of the job's own files: the script, its output, its site file.
        directory: absolute, where the command runs; relative paths in it are seen from there.
        resources: what it asks for.
        array: Slurm's indices, e.g. "0-4" or "0-99%4"; "" = a single job.
        signal_s: so many seconds before the time limit the job is told to save and stop.
        after: ids of jobs that must have ended well before it starts.
        source: folder to import this package from, where it is not installed; None = it is.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    directory: Path
    resources: Resources = field(default_factory=Resources)
    array: str = ""
    signal_s: int = 300
    after: tuple[str, ...] = ()
    source: Path | None = None

    def __post_init__(self) -> None:
        if self.signal_s < 0 or self.signal_s > 65535:
            raise InputError(f"signal_s={self.signal_s}: Slurm takes 0 to 65535 seconds")
        for word in (*self.command, str(self.folder), str(self.directory)):
            if _UNSAYABLE.search(word):
                raise InputError(f"{word!r}: a job's command and folder must be one line of UTF-8 without zero bytes")

        if not self.is_run and self.resources.most_nodes > 1:
            raise InputError(f"nodes={self.resources.nodes}: `llara-dist {self.command[0]}` is one process on one node")

    @property
    def is_run(self) -> bool:
        """Whether every task of the job runs the command; the others are one process."""
        return self.command[0] in _RUNS

    @property
    def script(self) -> Path:
        """The batch script's file."""
        return self.folder / SCRIPT

    @property
    def output(self) -> str:
        """Name of the job's output in its folder, with Slurm's patterns."""
        if "\\" in str(self.folder):
            return "slurm.out"  # to Slurm a backslash in a path switches every pattern off
        return "slurm-%A_%a.out" if self.array else "slurm-%j.out"


def sbatch_options(job: JobDescription, site: Site) -> list[str]:
    """All options of sbatch, each one word "--name=value"; the site's own come before what is asked for, which wins.

    Raises:
        InputError: one holds a line break.
    """
    asked = job.resources
    options = [
        f"--job-name={re.sub(r'[^A-Za-z0-9_.-]', '_', job.name)}",
        f"--chdir={job.folder}",
        f"--output={_output_path(job)}",
        "--open-mode=append",
        "--requeue",
        f"--nodes={asked.nodes}",
        f"--ntasks-per-node={asked.tasks_per_node if job.is_run else 1}",
        *site.sbatch,
    ]
    for name in ("partition", "account", "qos", "constraint"):
        value = getattr(asked, name) or getattr(site, name)
        options += [f"--{name}={value}"] if value else []
    if asked.gpus_per_node and site.gpus != "none":
        gpus = f"gres=gpu:{asked.gpus_per_node}" if site.gpus == "gres" else f"gpus-per-node={asked.gpus_per_node}"
        options.append(f"--{gpus}")
    options += [f"--cpus-per-task={asked.cpus_per_task}"] if asked.cpus_per_task else []
    options += [f"--mem={asked.mem}"] if asked.mem else []
    options += [f"--time={asked.time}"] if asked.time else []
    options += [f"--signal=B:USR1@{job.signal_s}"] if job.signal_s and job.is_run else []
    options += [f"--array={job.array}"] if job.array else []
    if job.after:
        options += [f"--dependency=afterok:{':'.join(job.after)}", "--kill-on-invalid-dep=yes"]
    for option in options:
        if "\n" in option:
            raise InputError(f"{option!r}: a line break cannot be part of an option of sbatch")
    return options


def _output_path(job: JobDescription) -> str:
    path = str(job.folder)
    escaped = path.replace("\\", "\\\\") if "\\" in path else path.replace("%", "%%")
    return f"{escaped}/{job.output}"


def script_text(job: JobDescription, site: Site) -> str:
    """The batch script: its options as comments, then the command, every word quoted."""
    options = sbatch_options(job, site)
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH {option}" for option in options if _PLAIN.fullmatch(option)]
    given = [shlex.quote(option) for option in options if not _PLAIN.fullmatch(option)]
    if given:
        lines += ["# Not to be said in #SBATCH lines; give to sbatch itself:", f"# {' '.join(given)}"]
    lines += [
        "set -eu",
        f"cd -- {shlex.quote(str(job.directory))}",
        f"export {site_file.VARIABLE}={shlex.quote(str(job.folder / 'site.yaml'))}",
    ]
    if job.source is not None:
        lines.append(f'export PYTHONPATH={shlex.quote(str(job.source))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    words = [sys.executable, "-m", "llara_dist.cluster.in_job", *job.command]
    quoted = " ".join(quote(word, bool(job.array)) for word in words)
    return "\n".join([*lines, f"exec {quoted}", ""])


def quote(word: str, is_array: bool) -> str:
    """A word for bash, exactly as it is; in an array {index} stands for the task's index."""
    if not is_array or INDEX not in word:
        return shlex.quote(word)
    return '"$SLURM_ARRAY_TASK_ID"'.join(shlex.quote(part) if part else "" for part in word.split(INDEX))


def array_indices(text: str) -> list[int]:
    """The indices of an array as Slurm writes them: "0-4", "1,3,5-9:2", each with "%4" for at most four at once.

    Raises:
        InputError: of another form.
    """
    wanted: list[int] = []
    listed, _, at_once = text.partition("%")
    for part in listed.split(","):
        match = re.fullmatch(r"(\d{1,7})(?:-(\d{1,7})(?::([1-9]\d{0,6}))?)?", part)
        if match is None or (at_once == "" and "%" in text) or not re.fullmatch(r"\d*", at_once):
            raise InputError(f"--array {text}: must be indices such as 0-4 or 1,3,5, with %2 for at most two at once")
        first, last = int(match[1]), int(match[2] or match[1])
        wanted += range(first, last + 1, int(match[3] or 1))
    if not wanted or len(set(wanted)) != len(wanted):
        raise InputError(f"--array {text}: names no index, or one twice")
    return wanted


def array_variants(arguments: Sequence[str]) -> dict[str, list[str]]:
    """The arguments of each index of `--array`, with {index} replaced; empty where none is given.

    Raises:
        InputError: the indices are of another form than Slurm's.
    """
    given = [word.partition("=")[2] for word in arguments if word.startswith("--array=")]
    given += [value for word, value in itertools.pairwise(arguments) if word == "--array"]
    if not given or given[-1] == "":
        return {}
    indices = [str(index) for index in array_indices(given[-1])]
    return {index: [word.replace(INDEX, index) for word in arguments] for index in indices}
