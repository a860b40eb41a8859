"""DeepSpeed's hostfile: which hosts there are, how many slots each has, and which of them a run takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from llara_dist.errors import InputError

_LINE = re.compile(r"(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]*)\s+slots=(?P<slots>[0-9]+)")

Slots = tuple[int, ...]
"""Slots of one host: indices of its GPUs, one rank each."""


def read_hostfile(path: Path) -> dict[str, Slots]:
    """Read lines `HOST slots=N`; `#` begins a comment.

    Stricter than DeepSpeed, which takes no notice of what follows `slots=N` and lets a host have no slots.

    Returns:
        Each host's slots 0 … N − 1, in the file's order: the first host gets rank 0.

    Raises:
        InputError: no such file, a line of another form, a host twice or without slots, no host at all.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{path}: {reason}; --hostfile names a file of lines `HOST slots=N`") from None
    hosts: dict[str, Slots] = {}
    for number, line in enumerate(lines, start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        match = _LINE.fullmatch(entry)
        if match is None:
            raise InputError(f"{path}, line {number}: {entry!r}: expected `HOST slots=N`, e.g. `node-a slots=8`")
        host, slots = match["host"], int(match["slots"])
        if host in hosts:
            raise InputError(f"{path}, line {number}: {host} is there already; give each host one line")
        if slots == 0:
            raise InputError(f"{path}, line {number}: {host} has no slots; leave it out or give it one")
        hosts[host] = tuple(range(slots))
    if not hosts:
        raise InputError(f"{path}: names no host; write lines `HOST slots=N`")
    return hosts


def choose(
    hosts: Mapping[str, Slots],
    include: str = "",
    exclude: str = "",
    num_nodes: int | None = None,
    num_gpus: int | None = None,
) -> dict[str, Slots]:
    """Which hosts and slots a run takes, by DeepSpeed's options of these names.

    Args:
        hosts: all there are, in order.
        include: only these: `HOST[:SLOT[,SLOT…]]`, several joined by `@`.
        exclude: all but these.
        num_nodes: only the first so many hosts.
        num_gpus: only the first so many slots of each.

    Raises:
        InputError: options that exclude each other, an unknown host or slot, nothing left, more than there is, or hosts
            that give different numbers of slots.
    """
    if sum((bool(include), bool(exclude), num_nodes is not None or num_gpus is not None)) > 1:
        raise InputError("--include, --exclude and --num_nodes/--num_gpus: use one of the three")
    chosen = dict(hosts)
    if include:
        named = _parse_filter(include, "--include", hosts)
        chosen = {host: tuple(slot for slot in chosen[host] if slot in named[host]) for host in hosts if host in named}
    elif exclude:
        named = _parse_filter(exclude, "--exclude", hosts)
        kept = {host: tuple(slot for slot in slots if slot not in named.get(host, ())) for host, slots in hosts.items()}
        chosen = {host: slots for host, slots in kept.items() if slots}
        if not chosen:
            raise InputError(f"--exclude {exclude}: no host is left")
    if num_nodes is not None:
        if not 1 <= num_nodes <= len(chosen):
            raise InputError(f"--num_nodes {num_nodes}: the hostfile names {len(chosen)} hosts")
        chosen = dict(list(chosen.items())[:num_nodes])
    if num_gpus is not None:
        for host, slots in chosen.items():
            if not 1 <= num_gpus <= len(slots):
                raise InputError(f"--num_gpus {num_gpus}: {host} has {len(slots)} slots in the hostfile")
        chosen = {host: slots[:num_gpus] for host, slots in chosen.items()}
    if len({len(slots) for slots in chosen.values()}) > 1:
        # DeepSpeed's launcher takes a rank's number modulo its host's slots for its local rank.
        counts = ", ".join(f"{host} {len(slots)}" for host, slots in chosen.items())
        raise InputError(f"hosts with different numbers of slots ({counts}) get wrong local ranks; use --num_gpus")
    return chosen


def _parse_filter(text: str, option: str, hosts: Mapping[str, Slots]) -> dict[str, Slots]:
    """Hosts and slots that a filter names; a host without slots means all of its slots."""
    named: dict[str, Slots] = {}
    for part in text.split("@"):
        host, colon, listed = part.partition(":")
        if host not in hosts:
            raise InputError(f"{option} {text}: {host or 'an empty name'} is not in the hostfile")
        slots = hosts[host]
        if colon:
            words = listed.split(",")
            if not all(word.isdecimal() and int(word) in hosts[host] for word in words):
                raise InputError(
                    f"{option} {text}: {host} has slots 0 to {len(hosts[host]) - 1}, not {listed or 'none'}"
                )
            slots = tuple(sorted({int(word) for word in words}))
        named[host] = tuple(sorted({*named.get(host, ()), *slots}))
    return named
