"""What may hang (a driver, a dead file server, a network), asked in a process of its own that has a time limit."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llara_dist.errors import InputError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""hidden from processes that are asked something about this node alone"""
_KILLED_S = 2.0
"""a process that a dead file server holds cannot be killed: it is left alone after so long"""


class ProbeError(InputError):
    """A question got no answer: it took too long, or what was asked broke. Holds for this node."""


@dataclass(frozen=True)
class Answer:
    """What a program said.

    Attributes:
        out: its standard output.
        err: its standard error.
        code: its exit status; negative = killed by that signal.
    """

    out: str
    err: str
    code: int

    @property
    def last_error(self) -> str:
        """The last line that it complained with, or how it ended."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        if self.code < 0:
            return f"killed: {signal.strsignal(-self.code)}"
        return lines[-1] if lines else f"exit code {self.code}"


def ask(
    command: Sequence[str], limit_s: float, stdin: str = "", environment: Mapping[str, str] | None = None
) -> Answer | None:
    """Run a program.

    Args:
        command: program and arguments.
        limit_s: seconds after which it and its children are killed.
        stdin: what it reads.
        environment: its variables, this process's by default.

    Returns:
        What it said, None where there is no such program.

    Raises:
        ProbeError: it took too long.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            encoding="utf-8",
            errors="replace",
        )
    except (FileNotFoundError, PermissionError):
        return None
    try:
        out, err = process.communicate(stdin, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise ProbeError(f"no answer within {limit_s:.0f} s ({Path(command[0]).name})", everywhere=False) from None
    finally:
        _kill(process)
    return Answer(out, err, process.returncode)


def _kill(process: subprocess.Popen[str]) -> None:
    """End a program and its children; what has ended is left alone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=_KILLED_S)


def call(function: Callable[..., Any], limit_s: float, /, alone: bool = True, **arguments: Any) -> Any:
    """Call a function in a Python process of its own.

    Args:
        function: of a module; takes and returns JSON values.
        limit_s: seconds after which the process is killed.
        alone: whether it shall not know of the launcher that started this rank.
        arguments: by name.

    Raises:
        ProbeError: it took too long, died, or raised (the message is the exception's).
    """
    environment = dict(os.environ)
    # The same package, however this process found it.
    places = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    if alone:
        for name in list(environment):
            if name in LAUNCHER_VARIABLES or name.startswith("TORCHELASTIC_"):
                del environment[name]
    command = [sys.executable, "-m", __name__, function.__module__, function.__qualname__]
    try:
        scratch = tempfile.TemporaryDirectory(prefix="llara_dist-doctor-", ignore_cleanup_errors=True)
    except OSError as problem:
        raise ProbeError(f"no folder for temporary files ({problem.strerror}); set TMPDIR to one", False) from None
    with scratch as environment["TMPDIR"]:  # whatever a killed process leaves there goes with it
        answer = ask(command, limit_s, json.dumps(arguments), environment)
    if answer is None:
        raise ProbeError(f"{sys.executable}: cannot be started", everywhere=False)
    try:
        reply = json.loads(answer.out.splitlines()[-1])
    except (ValueError, IndexError):
        raise ProbeError(f"the process that tried it died: {answer.last_error}", everywhere=False) from None
    if "error" in reply:
        raise ProbeError(reply["error"], everywhere=False)
    return reply["result"]


def _serve() -> None:
    """Answer one call: the function's name in argv, its arguments on stdin, the reply as the last line of stdout."""
    reply_to = os.dup(1)
    os.dup2(2, 1)  # libraries print what they like
    module, name = sys.argv[1:]
    try:
        function = getattr(importlib.import_module(module), name)
        reply = {"result": function(**json.load(sys.stdin))}
    except InputError as error:
        reply = {"error": str(error)}
    except Exception as error:  # whatever breaks in a library is what was asked for
        first = next(iter(str(error).strip().splitlines()), "")
        reply = {"error": f"{type(error).__name__}: {first}" if first else type(error).__name__}
    with open(reply_to, "w") as out:
        out.write(json.dumps(reply) + "\n")
    os._exit(0)  # threads of libraries are not waited for


if __name__ == "__main__":
    _serve()
