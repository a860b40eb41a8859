"""Which process this is, so that another one can tell later whether it still runs."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """One process, told apart from a later one that got the same process id.

    Attributes:
        host: the machine's name, for people.
        machine: where the process id means something: the kernel's boot id and the process-id namespace (containers);
            "" where the system tells neither.
        pid: the process id.
        started: the process's start in the kernel's clock ticks since boot.
    """

    host: str
    machine: str
    pid: int
    started: int

    def is_running(self) -> bool | None:
        """Whether the process lives; None where this cannot be known from here: another host or container."""
        if not self.machine or self.machine != _machine():
            return None
        state, started = process_state(self.pid)
        return state not in ("", "Z", "X") and started == self.started


def this_process() -> ProcessIdentity:
    """The calling process."""
    _, started = process_state(os.getpid())
    return ProcessIdentity(host=socket.gethostname(), machine=_machine(), pid=os.getpid(), started=started)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}.{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def process_state(pid: int) -> tuple[str, int]:
    """State letter and start time in clock ticks (proc(5), fields 3 and 22); ("", 0) where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", 0
    fields = text.rpartition(")")[2].split()  # the command's name before it may hold spaces and brackets
    return fields[0], int(fields[19])
