"""What runs on each host for `llara-dist launch`: it describes the host, starts the ranks, passes requests on.

`python -m llara_dist.cluster.node FOLDER` is started over ssh and talks through its standard streams. It writes a line
that describes the host and reads one that says what to run: arguments and variables need no quoting, and secrets among
them are in no process list. Further lines are requests: "stop" = the ranks save and stop, "kill" = they end at once.
When its input ends, the launcher or the network is gone: that is a request to stop as well, so that no host works on
alone.

Light imports only: this starts on every host before anything is known of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from llara_dist.errors import EXIT_BAD_INPUT, EXIT_RANK_LOST, EXIT_REQUEUE

MARK = "llara-dist node: "
"""Begins the line that describes the host; a login shell may have said anything before."""
STOP, KILL = "stop", "kill"
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "numpy")
"""What must have the same version on all hosts."""
_PORTS = range(20000, 32000)  # below those that Linux gives to outgoing connections
_OWN_CODES = (0, 1, EXIT_BAD_INPUT, EXIT_RANK_LOST, EXIT_REQUEUE)
_LAST_OUTPUT_WITHIN_S = 10.0
_SAVED_WITHIN_S = 600.0  # when the launcher is gone and nobody can press Ctrl-C again


@dataclass(frozen=True)
class NodeFacts:
    """What the launcher wants to know of a host.

    Attributes:
        python: version of the interpreter.
        code: hash of this package's source files.
        versions: of each of PACKAGES, None = not installed.
        address: IP address at which ssh reached the host; "" if not known.
        addresses: all IPv4 addresses but loopback's, each with its interface.
        port: a TCP port that nobody listens on.
    """

    python: str
    code: str
    versions: dict[str, str | None]
    address: str
    addresses: dict[str, str]
    port: int


@dataclass(frozen=True)
class NodeTask:
    """What a host is to run.

    Attributes:
        command: argument vector of DeepSpeed's launcher for one host.
        environment: variables, over those that ssh gave.
    """

    command: list[str]
    environment: dict[str, str]


def describe() -> NodeFacts:
    """This host, as `NodeFacts`."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    return NodeFacts(
        python=".".join(map(str, sys.version_info[:3])),
        code=code_hash(Path(__file__).parents[1]),
        versions={name: _version(name) for name in PACKAGES},
        address=connection[2] if len(connection) == 4 else "",
        addresses=_addresses(),
        port=_free_port(),
    )


def code_hash(package: Path) -> str:
    """Hash of the names and bytes of a package's Python files."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def exit_code(returncode: int, stop_requested: bool) -> int:
    """A host's exit code, from that of DeepSpeed's launcher, which hands a signal's negative number to `sys.exit`.

    Codes of our own stay. A rank that the request to stop ended had nothing to save yet; one that another signal ended
    is lost. 255 never comes from here: it is ssh's own.

    Args:
        returncode: as subprocess.Popen has it.
        stop_requested: whether the ranks were sent SIGTERM.
    """
    if stop_requested and returncode in (-signal.SIGTERM, 256 - signal.SIGTERM):
        return EXIT_REQUEUE
    return returncode if returncode in _OWN_CODES else EXIT_RANK_LOST


class Ranks:
    """The ranks of this host: DeepSpeed's launcher and its children, in a process group of their own."""

    def __init__(self, task: NodeTask) -> None:
        self._stop_requested = False
        self._ended = False
        self._signalling = threading.Lock()  # once the launcher is reaped, its process id may be another's
        self._launcher = subprocess.Popen(
            task.command,
            env={**os.environ, **task.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        # Ranks write into pipes that stay open: a lost connection must not break them while they save.
        streams = ((self._launcher.stdout, 1), (self._launcher.stderr, 2))
        self._relays = [threading.Thread(target=_relay, args=pair, daemon=True) for pair in streams]
        for relay in self._relays:
            relay.start()

    def stop(self) -> None:
        """Ask every rank to save and stop; DeepSpeed's launcher, asked itself, kills them after 30 s."""
        import psutil

        with self._signalling:
            self._stop_requested = True
            if self._ended:
                return
            launcher = psutil.Process(self._launcher.pid)
            for process in launcher.children() or [launcher]:  # the launcher, where it has started none yet
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()

    def kill(self) -> None:
        """End the launcher, the ranks and what they started."""
        with self._signalling:
            if not self._ended:
                os.killpg(self._launcher.pid, signal.SIGKILL)

    def wait(self) -> int:
        """The host's exit code, once everything that was written is passed on."""
        os.waitid(os.P_PID, self._launcher.pid, os.WEXITED | os.WNOWAIT)
        self.kill()  # what ranks left behind
        with self._signalling:
            self._ended = True
            code = self._launcher.wait()
        for relay in self._relays:
            relay.join(_LAST_OUTPUT_WITHIN_S)
        return exit_code(code, self._stop_requested)


def main() -> None:
    """Describe this host, run what the launcher sends, end with the ranks' exit code; 0 where it sends nothing."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        os.chdir(sys.argv[1])
        print(MARK + json.dumps(asdict(describe())), flush=True)
        line = sys.stdin.readline()
        if not line.endswith("\n"):
            return
        task = NodeTask(**json.loads(line))
        ranks = Ranks(task)
    except OSError as error:
        print(f"{error.filename or sys.argv[0]}: {error.strerror or error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    threading.Thread(target=_obey, args=(sys.stdin, ranks), daemon=True).start()
    code = ranks.wait()
    os._exit(code)  # an exit in order waits for the thread that reads requests


def _obey(requests: Iterable[str], ranks: Ranks) -> None:
    """Do what the launcher asks; when it is gone, stop, and after a while end at once."""
    for line in requests:
        if line.strip() == STOP:
            ranks.stop()
        elif line.strip() == KILL:
            ranks.kill()
    ranks.stop()
    timer = threading.Timer(_SAVED_WITHIN_S, ranks.kill)
    timer.daemon = True
    timer.start()


def _relay(source: IO[bytes], target: int) -> None:
    """Pass on what the ranks write; when nobody reads any more, take it from them all the same."""
    for chunk in iter(lambda: os.read(source.fileno(), 65536), b""):
        with contextlib.suppress(OSError):
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(target, rest) :]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _addresses() -> dict[str, str]:
    import psutil

    found: Mapping[str, list[Any]] = psutil.net_if_addrs()
    internet = {each.address: name for name, of in found.items() for each in of if each.family == socket.AF_INET}
    return {address: name for address, name in internet.items() if not address.startswith("127.")}


def _free_port() -> int:
    """A random one, so that two launches at the same moment do not find the same."""
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"no free TCP port among 100 of {_PORTS.start} to {_PORTS.stop - 1}")


if __name__ == "__main__":
    main()
