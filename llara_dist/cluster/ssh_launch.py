"""`llara-dist launch`: a run on the hosts of a hostfile, over ssh, through DeepSpeed's launcher on each host.

What plain `deepspeed --hostfile` leaves to chance is settled here. All hosts are looked at before anything starts.
Arguments and variables arrive as they are. Two runs on the same hosts take different ports and end only their own
processes. Ctrl-C saves. A host that is gone ends the run. The exit code says how it ended.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shlex
import signal
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llara_dist.cluster.connections import SSH_FAILED, Connections
from llara_dist.cluster.hostfile import Slots, choose, read_hostfile
from llara_dist.cluster.node import NodeFacts, NodeTask, describe
from llara_dist.console import say
from llara_dist.errors import (
    EXIT_BAD_INPUT,
    EXIT_RANK_LOST,
    EXIT_REQUEUE,
    InputError,
    RankLostError,
    RequeueError,
    RunFailedError,
)

CARRIED = (
    *("PYTHON", "OMP_", "MKL_", "TOKENIZERS_", "TORCH", "CUDA_", "NCCL", "GLOO_", "UCX", "FI_", "TRITON", "DS_"),
    *("HF_", "TRANSFORMERS_", "AWS_", "FSSPEC_", "MLFLOW", "WANDB_", "LLARA_DIST_", "LD_LIBRARY_PATH", "PATH"),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
)
"""Variables whose names begin so travel to every host."""
_PER_HOST = ("CUDA_VISIBLE_DEVICES", "LLARA_DIST_INIT_METHOD")
_LOST_AFTER = 3


def launch(
    hostfile: Path,
    arguments: list[str],
    include: str = "",
    exclude: str = "",
    num_nodes: int | None = None,
    num_gpus: int | None = None,
    master_addr: str = "",
    master_port: int | None = None,
    env: str = "",
    ssh: str = "",
    alive_s: int = 15,
    grace_s: float = 120.0,
) -> None:
    """Run train or evaluate on the hosts of a hostfile, one rank a slot.

    Args:
        hostfile: lines `HOST slots=N`, as DeepSpeed reads them.
        arguments: the command to run and its options.
        include: only these hosts and slots: `HOST[:SLOT[,SLOT]]`, several joined by `@`.
        exclude: all but these.
        num_nodes: only the first so many hosts.
        num_gpus: only the first so many slots of each host.
        master_addr: address of the first host for the ranks; default: the one ssh reached it at.
        master_port: its TCP port; default: a free one.
        env: names of more variables to carry, separated by commas.
        ssh: more options of ssh, e.g. "-p 2222".
        alive_s: a host that does not answer ssh for three times so many seconds is lost.
        grace_s: how long the other hosts may take to end by themselves after one has failed.

    Raises:
        InputError: hostfile, options, a host that cannot be reached or differs from this one: nothing was started; or
            the command found bad input.
        RequeueError: Ctrl-C or SIGTERM: all ranks have saved.
        RankLostError: a host or a rank is gone.
        RunFailedError: the run failed where no restart helps.
        KeyboardInterrupt: a second Ctrl-C: the ranks were ended at once.
    """
    hosts = choose(read_hostfile(hostfile), include, exclude, num_nodes, num_gpus)
    if not arguments:
        raise InputError("llara-dist launch: say what to run after its own options: train … or evaluate …")
    if alive_s < 1 or grace_s <= 0:
        raise InputError(f"--alive_s {alive_s}, --grace_s {grace_s}: must be positive")
    options = (
        *("BatchMode=yes", "ConnectTimeout=20", f"ServerAliveInterval={alive_s}"),
        *(f"ServerAliveCountMax={_LOST_AFTER}", "ControlPath=none"),  # a shared connection would not end with ours
    )
    try:
        command = ["ssh", "-T", *(word for option in options for word in ("-o", option)), *shlex.split(ssh)]
    except ValueError as error:
        raise InputError(f"--ssh {ssh}: {error}; write words as for a shell") from None
    start = Start(arguments, carried(os.environ, env), master_addr, master_port)
    asyncio.run(_run(Connections(list(hosts), command, node_command(os.getcwd()), grace_s), hosts, start))


@dataclass(frozen=True)
class Start:
    """What all hosts are told.

    Attributes:
        arguments: of `llara-dist`, on every rank.
        environment: variables.
        master_addr: "" = as found out.
        master_port: None = as found out.
    """

    arguments: list[str]
    environment: dict[str, str]
    master_addr: str
    master_port: int | None

    def tasks(self, hosts: Mapping[str, Slots], facts: Mapping[str, NodeFacts]) -> dict[str, NodeTask]:
        """What each host runs.

        Raises:
            InputError: the first host has no address that others could reach.
        """
        first = next(iter(hosts))
        address = self.master_addr or master_address(facts[first], alone=len(hosts) == 1)
        if not address:
            raise InputError(f"{first}: has no address but loopback's; name one with --master_addr")
        port = self.master_port or facts[first].port
        return {
            host: NodeTask(
                rank_command(hosts, place, address, port, self.arguments),
                {**interface_of(facts[host]), **self.environment},
            )
            for place, host in enumerate(hosts)
        }


async def _run(connections: Connections, hosts: Mapping[str, Slots], start: Start) -> None:
    """Look at all hosts, start the ranks, wait for their ends, say how it went."""
    stopping = killed = False

    def interrupt(number: signal.Signals) -> None:
        nonlocal stopping, killed
        if not stopping:
            stopping = True
            connections.stop()
            with contextlib.suppress(OSError):  # after SIGHUP there is nobody to read it
                say("stopping: the ranks save first; Ctrl-C again ends them at once")
        elif number == signal.SIGINT:
            killed = True
            connections.kill()

    # Under nohup the end of the terminal is no request to stop.
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    listened = (signal.SIGINT, signal.SIGTERM, *(() if ignored else (signal.SIGHUP,)))
    async with connections:
        tasks = start.tasks(hosts, checked(await connections.ask(), describe()))
        for number in listened:
            asyncio.get_running_loop().add_signal_handler(number, interrupt, number)
        connections.start(tasks)
        codes = await connections.ends(harmless=(0, EXIT_REQUEUE))
    if killed:
        raise KeyboardInterrupt
    ended = outcome(codes)
    if ended is not None:
        raise ended


def carried(environment: Mapping[str, str], more: str) -> dict[str, str]:
    """The variables that travel to the hosts.

    Args:
        environment: this process's.
        more: names of others, separated by commas.

    Raises:
        InputError: one of these is not set.
    """
    names = {name for name in environment if name.startswith(CARRIED) and name not in _PER_HOST}
    for name in filter(None, (part.strip() for part in more.split(","))):
        if name not in environment:
            raise InputError(f"--env {name}: not set here; set it before the command: {name}=VALUE llara-dist launch …")
        names.add(name)
    return {name: environment[name] for name in sorted(names)} | _python_path(environment)


def node_command(folder: str) -> str:
    """What ssh's shell on a host runs; the shell may be any (sh, csh, fish)."""
    found = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ} | _python_path(os.environ)
    variables = (f"{name}={value}" for name, value in found.items())
    return "exec " + shlex.join(
        ["env", *variables, sys.executable, "-P", "-u", "-m", "llara_dist.cluster.node", folder]
    )


def _python_path(environment: Mapping[str, str]) -> dict[str, str]:
    """Where Python finds this package on every host: beside it, unless it is installed."""
    beside = Path(__file__).parents[2]
    installed = beside in (Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    entries = [
        *([] if installed else [str(beside)]),
        *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    return (
        {"PYTHONPATH": os.pathsep.join(dict.fromkeys(os.path.abspath(entry) for entry in entries))} if entries else {}
    )


def rank_command(
    hosts: Mapping[str, Slots], place: int, address: str, port: int, arguments: Sequence[str]
) -> list[str]:
    """DeepSpeed's launcher for one host, which starts a rank for each of its slots.

    Args:
        hosts: all of the run.
        place: of this host among them.
        address: of the first one.
        port: there.
        arguments: of `llara-dist`.
    """
    world = base64.urlsafe_b64encode(json.dumps({host: list(slots) for host, slots in hosts.items()}).encode()).decode()
    return [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--node_rank={place}"),
        *(f"--master_addr={address}", f"--master_port={port}", "--no_local_rank", "--log_level=critical"),
        *("--module", "llara_dist.cli", *arguments),
    ]


def checked(answers: Mapping[str, NodeFacts | str], here: NodeFacts) -> dict[str, NodeFacts]:
    """The hosts' facts, if all answered and are like this one.

    Raises:
        InputError: not all did or are; the first of them is named.
    """
    troubles = {host: answer for host, answer in answers.items() if isinstance(answer, str)}
    facts = {host: answer for host, answer in answers.items() if isinstance(answer, NodeFacts)}
    for host, there in facts.items():
        if found := differences(here, there):
            troubles[host] = f"{', '.join(found)}; all hosts must run the same"
    if troubles:
        host = next(host for host in answers if host in troubles)
        others = [each for each in answers if each in troubles and each != host]
        more = f" (trouble also with {', '.join(others)})" if others else ""
        raise InputError(f"{host}: {troubles[host]}; nothing was started{more}")
    return facts


def differences(here: NodeFacts, there: NodeFacts) -> list[str]:
    """What of a host's Python, code and packages is not as here."""
    found = [] if here.python == there.python else [f"Python {there.python}, here {here.python}"]
    if here.code != there.code:
        found.append("other code of llara_dist than here")
    for name, version in here.versions.items():
        if there.versions.get(name) != version:
            found.append(f"{name} {there.versions.get(name) or 'missing'}, here {version or 'missing'}")
    return found


def master_address(first: NodeFacts, alone: bool) -> str:
    """Where the first host's rank 0 waits for the others; "" if no address is known.

    The address that ssh reached, unless that is loopback's: the launcher may run on that host itself.
    """
    if alone:
        return "127.0.0.1"
    if first.address in ("", "::1") or first.address.startswith("127."):
        return next(iter(first.addresses), "")
    return first.address


def interface_of(facts: NodeFacts) -> dict[str, str]:
    """The interface for gloo, which else takes what the host's own name resolves to: on Debian, loopback's."""
    name = facts.addresses.get(facts.address) or next(iter(facts.addresses.values()), "")
    return {"GLOO_SOCKET_IFNAME": name} if name else {}


def outcome(codes: Mapping[str, int]) -> Exception | None:
    """How the run ended: what explains the others' ends comes first.

    Args:
        codes: of each host; SSH_FAILED = its connection was lost.
    """

    def named(code: int) -> str:
        return ", ".join(host for host, each in codes.items() if each == code)

    present = set(codes.values())
    if EXIT_BAD_INPUT in present:
        return InputError(f"{named(EXIT_BAD_INPUT)}: bad input, said above; correct it and start again")
    if 1 in present:
        return RunFailedError(f"{named(1)}: the run failed, see above")
    if SSH_FAILED in present:
        return RankLostError(
            f"{named(SSH_FAILED)}: lost, ssh has no connection any more; start again with --resume auto, or without "
            f"the lost: --exclude {named(SSH_FAILED).replace(', ', '@')}"
        )
    if EXIT_RANK_LOST in present:
        return RankLostError(f"{named(EXIT_RANK_LOST)}: a rank was lost, see above; start again with --resume auto")
    if EXIT_REQUEUE in present:
        return RequeueError("on request: start again to go on, train with --resume auto")
    return None
