"""This node's name and address, and two ranks that add their numbers: does what gloo and NCCL stand on work here?"""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from llara_dist.doctor.bounded import ProbeError, call
from llara_dist.doctor.verdicts import error, passed, skipped, warning
from llara_dist.errors import Finding

NUMBERS = 4 << 20
"""float32 numbers that are reduced: 16 MiB"""
ROUNDS = 5
RESOLVING_S = 15.0
PAIR_S = 120.0
JOINING_S = 60.0


def look_up_host() -> dict[str, Any]:
    """This host's name, the addresses that it resolves to and those that the host has; in a process of its own."""
    import psutil

    name = socket.gethostname()
    try:
        resolved = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except OSError:
        resolved = []
    families = (socket.AF_INET, socket.AF_INET6)
    own = sorted(
        {
            address.address.partition("%")[0]
            for addresses in psutil.net_if_addrs().values()
            for address in addresses
            if address.family in families
        }
    )
    return {"name": name, "resolved": resolved, "own": own}


def check_host_name(name: str, resolved: Sequence[str], own: Sequence[str]) -> list[Finding]:
    """The host's name leads to an address of this host that other nodes can reach.

    Args:
        name: of the host.
        resolved: addresses that the name resolves to.
        own: addresses that the host has.
    """
    others = "gloo and NCCL of several nodes cannot meet"
    interface = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that the nodes share"
    if not resolved:
        remedy = f"add it to /etc/hosts or DNS with an address that other nodes reach, or {interface}"
        return [warning("host name", f"{name} does not resolve; {others}", remedy)]
    reachable = [address for address in resolved if not ipaddress.ip_address(address.partition("%")[0]).is_loopback]
    if not reachable:
        remedy = f"for several nodes, correct /etc/hosts, or {interface}"
        return [warning("host name", f"{name} is {', '.join(resolved)}, reached from here only: {others}", remedy)]
    foreign = [address for address in reachable if address.partition("%")[0] not in own]
    if len(foreign) == len(reachable):
        remedy = f"correct /etc/hosts or DNS, or {interface}"
        return [warning("host name", f"{name} is {', '.join(foreign)}, which is no address of this host", remedy)]
    return [passed("host name", f"{name} is {', '.join(reachable)}")]


def try_pair(backend: str) -> dict[str, Any]:
    """Two ranks of this node add 16 MiB; called in a process of its own, which the two are forked from.

    Args:
        backend: gloo; or nccl, a GPU each.

    Returns:
        Seconds a reduction took, and whether the sum was right.
    """
    import multiprocessing

    import torch.distributed  # once, for both  # noqa: F401

    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="llara_dist-doctor-") as folder:
        ranks = [context.Process(target=_pair_rank, args=(rank, backend, folder, answers)) for rank in (0, 1)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            raise RuntimeError(answers.get() if not answers.empty() else "a rank died")
        first, second = answers.get(), answers.get()
    return {"seconds": max(first[0], second[0]), "right": first[1] and second[1]}


def _pair_rank(rank: int, backend: str, folder: str, answers: Any) -> None:
    import torch
    import torch.distributed as dist

    try:
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        store = dist.FileStore(os.path.join(folder, "rendezvous"), 2)
        dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=JOINING_S))
        answers.put(reduce_numbers(device, rank, 2))
        dist.destroy_process_group()
    except Exception as raised:  # whatever the backend raises is what was asked for
        answers.put(f"{backend}: {str(raised).strip().splitlines()[0]}")
        os._exit(1)


def reduce_numbers(device: Any, rank: int, size: int) -> tuple[float, bool]:
    """All-reduce 16 MiB over the process group; seconds a reduction took, and whether the sum was right.

    Args:
        device: of this rank's numbers.
        rank: of this process.
        size: of the group.
    """
    import torch
    import torch.distributed as dist

    expected = float(size * (size + 1) // 2)
    numbers = torch.full((NUMBERS,), float(rank + 1), device=device)
    dist.all_reduce(numbers)
    right = bool((numbers == expected).all())
    start = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(numbers)
    float(numbers[0])  # a GPU has finished once a number is here
    return (time.perf_counter() - start) / ROUNDS, right


def bandwidth(seconds: float, ranks: int) -> float:
    """Bytes a second through each rank's link: 2 (n − 1) / n of the numbers go each way (NCCL's "bus bandwidth")."""
    return 2 * (ranks - 1) / ranks * NUMBERS * 4 / seconds


def check_reduction(seconds: float, right: bool, ranks: int, backend: str) -> list[Finding]:
    """What an all-reduce gave.

    Args:
        seconds: that it took.
        right: whether the sum was.
        ranks: that took part.
        backend: gloo or nccl.
    """
    what = f"{backend}, {ranks} ranks"
    if not right:
        return [error("all-reduce", f"{what}: a wrong sum", "take the node out of service; try NCCL_P2P_DISABLE=1")]
    return [passed("all-reduce", f"{what}: right, {bandwidth(seconds, ranks) / 1e9:.2f} GB/s")]


def examine(gpus: int, quick: bool) -> list[Finding]:
    """The topic's findings.

    Args:
        gpus: that torch sees here.
        quick: leave out the two ranks.
    """
    try:
        findings = check_host_name(**call(look_up_host, RESOLVING_S))
    except ProbeError as silent:
        remedy = "have the name service (DNS, LDAP) mended, or add this host to /etc/hosts"
        findings = [warning("host name", f"looking it up: {silent}", remedy)]
    if quick:
        return [*findings, skipped("all-reduce", "not tried: --quick")]
    for backend in ["gloo", *(["nccl"] if gpus > 1 else [])]:
        try:
            findings += check_reduction(**call(try_pair, PAIR_S, backend=backend), ranks=2, backend=backend)
        except ProbeError as silent:
            remedy = "see the host name and the links above; NCCL_DEBUG=INFO says more of NCCL"
            findings.append(error("all-reduce", f"two ranks on this node: {silent}", remedy))
    return findings
