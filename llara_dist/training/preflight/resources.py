"""What the machine has: memory, disk, open files; and whether a run fits in."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from llara_dist.console import GIB
from llara_dist.errors import Finding

if TYPE_CHECKING:
    import torch

CERTAIN = 1.2
"""an estimate so many times what is free is an error; from 0.9 on it is a warning, since estimates err"""
TIGHT = 0.9
FILES = 256
"""shards that one reader keeps open at most, besides what the libraries open"""


def free_host_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path | None = None) -> int:
    """Host memory that this node's processes can still take: what Linux says is available, within cgroup limits.

    Args:
        meminfo: Linux's account of memory.
        cgroup: this process's folder of control group v2, found by default; those above it limit it too.
    """
    fields = (line.split() for line in meminfo.read_text().splitlines())
    free = next(int(field[1]) << 10 for field in fields if field[0] == "MemAvailable:")
    if cgroup is None:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        own = next((line[3:] for line in groups if line.startswith("0::")), "/")
        cgroup = Path("/sys/fs/cgroup") / own.lstrip("/")
    for folder in (cgroup, *cgroup.parents):
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if limit != "max":
            # Cached file pages are given back when memory is short.
            free = min(free, int(limit) - used + int(counts.get("inactive_file", 0)))
    return free


def check_memory(
    device_bytes: int, host_bytes: int, device_free: int | None, host_free: int, local_ranks: int, where: str
) -> list[Finding]:
    """Whether a rank fits on its GPU, and the node's ranks in the node's memory.

    Args:
        device_bytes: needed by one rank on its device; on the CPU, in host memory too.
        host_bytes: needed by its process in host memory.
        device_free: bytes that are free on this rank's GPU, None on the CPU.
        host_free: bytes of host memory that the node's ranks can still take together.
        local_ranks: ranks on this node.
        where: names rank and host in messages.
    """
    findings = []
    if device_free is not None:
        findings += _compare(device_bytes, device_free, f"{where}: GPU memory", everywhere=False)
    host = host_bytes + (device_bytes if device_free is None else 0)
    findings += _compare(host * local_ranks, host_free, f"{where}: memory of {local_ranks} ranks", everywhere=True)
    return findings


def _compare(need: int, free: int, what: str, everywhere: bool) -> list[Finding]:
    if need <= TIGHT * free:
        return []
    certain = need > CERTAIN * free
    return [
        Finding(
            "memory",
            f"{what}: about {need / GIB:.1f} GiB needed, {max(0, free) / GIB:.1f} GiB free",
            "lower data.max_tokens_per_microbatch, set model.activation_checkpointing=auto, or shard over more ranks",
            "error" if certain else "warning",
            everywhere,
        )
    ]


def free_device_bytes(device: torch.device) -> int | None:
    """Bytes that are free on a GPU, None for the CPU."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def nearest_existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_disk(out: Path, need: int, free: int | None = None) -> list[Finding]:
    """Whether the run's folder can be written and holds its checkpoints; nothing is written to find out.

    Args:
        out: the run's folder, which need not be there.
        need: bytes of all checkpoints that lie there at once.
        free: bytes free there, asked of the file system by default.
    """
    folder = nearest_existing(out)
    host = socket.gethostname()
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "is no folder" if not folder.is_dir() else f"cannot be written by this user on {host}"
        return [Finding("disk", f"out={out}: {folder} {what}", "choose another --out")]
    free = shutil.disk_usage(folder).free if free is None else free
    if need <= free:
        return []
    return [
        Finding(
            "disk",
            f"out={out}: checkpoints need {need / GIB:.2f} GiB, {free / GIB:.2f} GiB are free on {host}",
            "free some, lower checkpoint.keep_last, or choose another --out",
        )
    ]


def check_open_files(sources: int, limit: int | None = None) -> list[Finding]:
    """Whether a reader may open as many shards as it keeps.

    Args:
        sources: data sets that the samples come from.
        limit: of open files, this process's by default.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    need = FILES * (sources + 1)
    if limit == resource.RLIM_INFINITY or limit >= need:
        return []
    found = f"at most {limit} open files; reading may need {need}"
    return [Finding("open files", found, f"start after `ulimit -n {need}`", "warning")]


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bfloat16 in hardware; without, it is 6 to 20 times slower than float32."""
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def check_bf16(wanted: bool, has_bf16: bool) -> list[Finding]:
    """A warning where a CPU without bfloat16 is to multiply in it."""
    if not wanted or has_bf16:
        return []
    found = "model.compute_dtype=bfloat16: this CPU has no bfloat16 instructions and takes 6 to 20 times as long"
    return [Finding("compute dtype", found, "set model.compute_dtype=float32 (with model.bits=4 or 32)", "warning")]
