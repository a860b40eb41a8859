"""ssh connections to the hosts of a run: asked what they are, told what to run, followed until all have ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import IO

from llara_dist.cluster.node import KILL, MARK, STOP, NodeFacts, NodeTask

SSH_FAILED = 255
"""ssh's own exit code: it did not get, or lost, its connection."""
_ANSWER_WITHIN_S = 90.0
_KILLED_WITHIN_S = 10.0


class Connections:
    """One ssh to `cluster/node.py` on each host; a context manager, which cuts at its end those that are left.

    Attributes:
        hosts: their names; the first one's output is passed on as it is, each line of the others' with its host's name.

    Args:
        hosts: as ssh knows them.
        ssh: the command, up to the host's name.
        node: the remote command, quoted for a shell.
        grace_s: how long the other hosts may take to end by themselves after one has failed.
    """

    def __init__(self, hosts: Sequence[str], ssh: Sequence[str], node: str, grace_s: float) -> None:
        self.hosts = list(hosts)
        self._ssh, self._node, self._grace_s = list(ssh), node, grace_s
        self._processes: dict[str, Process] = {}
        self._deadline = float("inf")
        self._killed = False

    async def __aenter__(self) -> Connections:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._cut()
        await asyncio.gather(*(process.wait() for process in self._processes.values()))

    async def ask(self) -> dict[str, NodeFacts | str]:
        """Connect to all hosts at once: what each says of itself, or why it says nothing."""
        answers = await asyncio.gather(*(self._ask(host) for host in self.hosts))
        return dict(zip(self.hosts, answers, strict=True))

    def start(self, tasks: Mapping[str, NodeTask]) -> None:
        """Tell each host what to run."""
        for host, task in tasks.items():
            self._send(host, json.dumps(asdict(task)))

    def stop(self) -> None:
        """Ask all ranks to save and stop, however long that takes."""
        for host in self.hosts:
            self._send(host, STOP)

    def kill(self) -> None:
        """End all ranks at once."""
        self._killed = True
        self._deadline = asyncio.get_running_loop().time() + _KILLED_WITHIN_S
        for host in self.hosts:
            self._send(host, KILL)

    async def ends(self, harmless: Sequence[int]) -> dict[str, int]:
        """Pass on what the hosts say until all have ended.

        Args:
            harmless: exit codes after which the others may go on; after any other they have `grace_s`, then are killed.

        Returns:
            Each host's exit code; SSH_FAILED where the connection was lost.
        """
        loop = asyncio.get_running_loop()
        waiting = {asyncio.create_task(self._follow(host), name=host) for host in self.hosts}
        codes: dict[str, int] = {}
        while waiting:
            done, waiting = await asyncio.wait(waiting, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
            codes |= {task.get_name(): task.result() for task in done}
            for host in (task.get_name() for task in done if task.result() == SSH_FAILED):
                _print(f"{host}: connection lost", sys.stderr)
            if self._deadline == float("inf") and any(code not in harmless for code in codes.values()):
                self._deadline = loop.time() + self._grace_s
            if waiting and loop.time() > self._deadline:
                left = ", ".join(sorted(task.get_name() for task in waiting))
                if self._killed:
                    self._cut()
                else:
                    _print(f"{left}: still there {self._grace_s:.0f} s after another host failed: ended", sys.stderr)
                    self.kill()
        return codes

    async def _ask(self, host: str) -> NodeFacts | str:
        process = await asyncio.create_subprocess_exec(
            *(*self._ssh, host, self._node),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,  # Ctrl-C is the launcher's to handle
        )
        self._processes[host] = process
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with asyncio.timeout(_ANSWER_WITHIN_S):
                async for line in process.stdout:
                    text = line.decode(errors="replace")
                    if text.startswith(MARK):
                        return NodeFacts(**json.loads(text.removeprefix(MARK)))
                said = (await process.stderr.read()).decode(errors="replace").strip()
                code = await process.wait()
        except TimeoutError:
            return f"no answer within {_ANSWER_WITHIN_S:.0f} s; are its file systems there?"
        reason = said.splitlines()[-1].strip() if said else f"ended with code {code}"
        if code == SSH_FAILED:
            return f"not reached: {reason}; `ssh {host} true` must work without asking anything"
        return f"cannot run llara_dist: {reason}"

    async def _follow(self, host: str) -> int:
        process = self._processes[host]
        assert process.stdout is not None
        assert process.stderr is not None
        prefix = "" if host == self.hosts[0] else f"{host}: "
        await asyncio.gather(_pass_on(process.stdout, prefix, sys.stdout), _pass_on(process.stderr, prefix, sys.stderr))
        code = await process.wait()
        return SSH_FAILED if code < 0 else code

    def _send(self, host: str, line: str) -> None:
        process = self._processes[host]
        if process.returncode is None and process.stdin is not None:
            process.stdin.write(f"{line}\n".encode())

    def _cut(self) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()


async def _pass_on(source: asyncio.StreamReader, prefix: str, target: IO[str]) -> None:
    """Whole lines only, so that those of several hosts do not mix."""
    rest = b""
    while chunk := await source.read(65536):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            _print(prefix + line.decode(errors="replace"), target)
    if rest:
        _print(prefix + rest.decode(errors="replace"), target)


def _print(line: str, target: IO[str]) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more; the run goes on
        print(line, file=target, flush=True)
