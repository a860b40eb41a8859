"""What joins the GPUs of a node and the nodes: NVLink, InfiniBand, NCCL's and gloo's settings, the limits they meet."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llara_dist.console import GIB
from llara_dist.doctor.bounded import ProbeError, ask
from llara_dist.doctor.gpu_facts import GpuFacts
from llara_dist.doctor.verdicts import error, passed, skipped, warning
from llara_dist.errors import Finding
from llara_dist.training.preflight.resources import check_open_files

LINKS = {
    "NV": "NVLink",
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "the CPU's PCIe bridge",
    "NODE": "the PCIe bridges of one socket",
    "SYS": "the link between sockets",
}
"""what `nvidia-smi topo -m` calls the way between two GPUs, from the shortest to the longest"""
SHARED_MEMORY = GIB
"""bytes of /dev/shm that NCCL and data workers of a node are content with"""
DOCKER_SHARED_MEMORY = 64 << 20
_OFF = ("1", "true", "yes")


@dataclass(frozen=True)
class Port:
    """A port of an InfiniBand (or RoCE) device.

    Attributes:
        name: device and port number.
        active: whether the link is up.
        rate: in the kernel's words: "400 Gb/sec (4X NDR)".
        layer: InfiniBand or Ethernet.
    """

    name: str
    active: bool
    rate: str
    layer: str


@dataclass(frozen=True)
class LinkFacts:
    """Everything that was found out about this node's links.

    Attributes:
        topology: `nvidia-smi topo -m`, "" without.
        ports: InfiniBand and RoCE.
        interfaces: names of the network interfaces.
        settings: variables NCCL_*, GLOO_* and TORCH_NCCL_*.
        shared_memory: bytes that /dev/shm can hold; 0 = it is not there.
        shared_memory_free: bytes of it that are free.
        locked_memory: bytes that a process may lock, None = without limit.
    """

    topology: str = ""
    ports: Sequence[Port] = ()
    interfaces: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    shared_memory: int = 0
    shared_memory_free: int = 0
    locked_memory: int | None = None


def probe(gpus: int) -> LinkFacts:
    """Look at this node; nvidia-smi is asked where there are several GPUs."""
    topology = ""
    if gpus > 1:
        try:
            answer = ask(["nvidia-smi", "topo", "-m"], 30.0)
            topology = answer.out if answer and answer.code == 0 else ""
        except ProbeError:
            pass  # said with the GPUs
    memory = Path("/dev/shm")
    usage = shutil.disk_usage(memory) if memory.is_dir() else None
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    prefixes = ("NCCL_", "GLOO_", "TORCH_NCCL_")
    return LinkFacts(
        topology=topology,
        ports=read_ports(Path("/sys/class/infiniband")),
        interfaces=[name for _, name in socket.if_nameindex()],
        settings={name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)},
        shared_memory=usage.total if usage else 0,
        shared_memory_free=usage.free if usage else 0,
        locked_memory=None if locked == resource.RLIM_INFINITY else locked,
    )


def read_ports(devices: Path) -> list[Port]:
    """The ports under /sys/class/infiniband."""

    def said(port: Path, name: str) -> str:
        try:
            return (port / name).read_text().strip()
        except OSError:
            return ""

    return [
        Port(
            f"{port.parts[-3]}:{port.name}",
            "ACTIVE" in said(port, "state"),
            said(port, "rate"),
            said(port, "link_layer"),
        )
        for port in sorted(devices.glob("*/ports/*"))
    ]


def ways_between(topology: str) -> dict[str, list[str]]:
    """Pairs of GPUs by the kind of way between them, from the text of `nvidia-smi topo -m`."""
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", topology).splitlines() if "GPU" in line]
    heading = next((row for row in rows if "X" not in row), [])
    found: dict[str, list[str]] = {}
    for one, *cells in (row for row in rows if row[0].startswith("GPU") and "X" in row):
        for other, cell in zip(heading, cells, strict=False):
            kind = cell.rstrip("0123456789")
            if other.startswith("GPU") and int(one[3:]) < int(other[3:]) and kind in LINKS:
                found.setdefault(kind, []).append(f"{one}–{other}")
    return found


def check_topology(facts: LinkFacts, gpus: int) -> list[Finding]:
    """The ways between the node's GPUs."""
    if gpus < 2:
        return []
    pairs = ways_between(facts.topology)
    if not pairs:
        return [skipped("between GPUs", "`nvidia-smi topo -m` does not say how they are joined")]
    order = list(LINKS)
    worst = max(pairs, key=order.index)
    if worst == "NV":
        return [passed("between GPUs", f"NVLink between all {gpus}")]
    some = ", ".join(pairs[worst][:3]) + (" …" if len(pairs[worst]) > 3 else "")
    found = f"{some} through {LINKS[worst]} ({worst})"
    if worst in ("NODE", "SYS"):
        remedy = "expect slower collectives: ZeRO-1 or 2 rather than 3, and larger micro-batches"
        return [warning("between GPUs", found, remedy)]
    return [passed("between GPUs", found)]


def check_fabric(facts: LinkFacts) -> list[Finding]:
    """InfiniBand's ports, and whether memory for them may be locked."""
    if not facts.ports:
        return [skipped("InfiniBand", "no device: nodes talk over TCP")]
    up = [port for port in facts.ports if port.active]
    if not up:
        names = ", ".join(port.name for port in facts.ports)
        remedy = "have the cable or the subnet manager looked at; until then NCCL falls back to TCP"
        return [warning("InfiniBand", f"no port is up ({names})", remedy)]
    down = [port.name for port in facts.ports if not port.active]
    shown = ", ".join(f"{port.name} {port.rate}" for port in up) + (f"; down: {', '.join(down)}" if down else "")
    findings = [passed("InfiniBand", shown)]
    if facts.settings.get("NCCL_IB_DISABLE", "").lower() in _OFF:
        findings.append(warning("InfiniBand", "NCCL_IB_DISABLE is set: NCCL uses TCP instead", "unset NCCL_IB_DISABLE"))
    if facts.locked_memory is not None:
        found = f"at most {facts.locked_memory >> 10} KiB may be locked; InfiniBand locks its buffers"
        remedy = "ulimit -l unlimited (Slurm: PropagateResourceLimitsExcept=MEMLOCK; docker: --ulimit memlock=-1)"
        findings.append(warning("locked memory", found, remedy))
    return findings


def check_settings(facts: LinkFacts) -> list[Finding]:
    """Variables that direct NCCL and gloo: interfaces that are not there, fast ways that are switched off."""
    findings = []
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = facts.settings.get(name, "")
        if wanted and not names_interface(wanted, facts.interfaces, exact=name.startswith("GLOO")):
            found = f"{name}={wanted}: no such network interface; there are {', '.join(facts.interfaces)}"
            findings.append(error("interfaces", found, "correct or unset it"))
    for name, what in (("NCCL_P2P_DISABLE", "NVLink and PCIe between GPUs"), ("NCCL_SHM_DISABLE", "shared memory")):
        if facts.settings.get(name, "").lower() in _OFF:
            findings.append(warning("NCCL", f"{name} is set: {what} is not used", f"unset {name}"))
    if facts.settings.get("NCCL_DEBUG", "").upper() in ("INFO", "TRACE"):
        found = f"NCCL_DEBUG={facts.settings['NCCL_DEBUG']} writes much into the log"
        findings.append(warning("NCCL", found, "unset it once things work"))
    if not findings:
        shown = ", ".join(f"{name}={value}" for name, value in facts.settings.items())
        findings.append(passed("variables", shown or "no NCCL_* or GLOO_* is set: defaults"))
    return findings


def names_interface(wanted: str, interfaces: Sequence[str], exact: bool) -> bool:
    """Whether NCCL_SOCKET_IFNAME (prefixes; = exact, ^ all but) or GLOO_SOCKET_IFNAME (exact) names an interface.

    Source: NCCL's manual, environment variables.
    """
    if exact:
        return all(name in interfaces for name in wanted.split(","))
    inverted, rest = wanted.startswith("^"), wanted.removeprefix("^")
    whole, names = rest.startswith("="), rest.removeprefix("=").split(",")
    named = [each for each in interfaces if any(each == name if whole else each.startswith(name) for name in names)]
    return len(named) < len(interfaces) if inverted else bool(named)


def check_limits(facts: LinkFacts, gpus: int, open_files: int | None = None) -> list[Finding]:
    """/dev/shm and open files.

    Args:
        facts: of this node.
        gpus: on it.
        open_files: how many a process may open, this one's limit by default.
    """
    findings = check_open_files(1, open_files)
    size = facts.shared_memory
    if size < SHARED_MEMORY:
        shown = f"/dev/shm holds {size >> 20} MiB" if size else "there is no /dev/shm"
        docker = ", Docker's default" if size == DOCKER_SHARED_MEMORY else ""
        remedy = "docker --shm-size=8g or --ipc=host; data workers and NCCL between GPUs pass data through it"
        found = f"{shown}{docker}"
        several = gpus > 1 and size <= DOCKER_SHARED_MEMORY
        findings.append((error if several else warning)("shared memory", found, remedy))
    elif facts.shared_memory_free < SHARED_MEMORY // 4:
        found = f"/dev/shm: {facts.shared_memory_free >> 20} MiB are free of {size / GIB:.1f} GiB"
        findings.append(warning("shared memory", found, "remove what dead processes left there: ls -l /dev/shm"))
    if not findings:
        findings.append(passed("limits", f"/dev/shm {size / GIB:.1f} GiB; enough open files"))
    return findings


def examine(facts: LinkFacts, gpus: GpuFacts) -> list[Finding]:
    """The topic's findings."""
    count = len(gpus.torch.devices)
    nccl = [passed("NCCL", gpus.torch.nccl)] if gpus.torch.nccl else []
    return [
        *nccl,
        *check_topology(facts, count),
        *check_fabric(facts),
        *check_settings(facts),
        *check_limits(facts, count),
    ]
