"""What every result holds: the machine, its load, versions; and how numbers of several rounds are told.

A number without the hardware and the versions that it depends on says nothing a year later.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "triton", "liger_kernel", "flash_attn")
PEER_PACKAGES = ("trl", "unsloth", "llamafactory")


def machine(device: str, threads: int, packages: tuple[str, ...] = LIBRARIES) -> dict[str, Any]:
    """Hardware, versions, and the load before anything is measured.

    Args:
        device: cpu or cuda.
        threads: that compute on the CPU.
        packages: distributions whose versions the numbers depend on.
    """
    return {
        "hardware": hardware(device, threads),
        "versions": versions(packages),
        "load_average_before": os.getloadavg(),
    }


def hardware(device: str, threads: int) -> str:
    """What it ran on."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores"
    told = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in told if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {os.cpu_count()} cores, {threads} threads"


def versions(packages: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Of Python and of what the numbers depend on."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def peers_versions(python: str) -> dict[str, str]:
    """Of the peers that are installed where another interpreter looks."""
    ask = (
        "from importlib.metadata import distributions\n"
        f"print(*(f'{{d.name}}={{d.version}}' for d in distributions() if d.name.lower() in {PEER_PACKAGES}))"
    )
    told = subprocess.run([python, "-c", ask], capture_output=True, text=True).stdout
    return dict(item.split("=", 1) for item in told.split())


def spread(values: list[float]) -> dict[str, float]:
    """Median and range, to four significant digits."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def say(line: str) -> None:
    """To standard error, so that standard output holds the result alone."""
    print(line, file=sys.stderr, flush=True)
