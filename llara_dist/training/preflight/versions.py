"""Which versions of Python and of the libraries a run is tested with."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from llara_dist import __version__
from llara_dist.errors import Finding

CHECK = "versions"

TESTED = {
    "python": ("3.11", "3.13"),
    "torch": ("2.11", "2.13"),
    "transformers": ("5.17", "5.23"),
    "deepspeed": ("0.19.3", "0.19"),
    "peft": ("0.21", "0.21"),
    "bitsandbytes": ("0.50", "0.50"),
    "triton": ("3.6", "3.9"),
}
"""Oldest that works, newest tested; the newest up to its own number of parts: 2.13 stands for 2.13.1 as well."""

WHY = {"deepspeed": "activation checkpointing under ZeRO-3 with frozen parameters fails before it"}
"""What an older version breaks."""


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that a result depends on."""
    names = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")
    return {"llara_dist": __version__, "python": platform.python_version()} | {name: version(name) for name in names}


def installed_versions() -> dict[str, str | None]:
    """What is installed of `TESTED`, read from the packages' metadata; nothing is imported."""

    def find(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: platform.python_version() if name == "python" else find(name) for name in TESTED}


def check_versions(installed: Mapping[str, str | None], on_gpu: bool) -> list[Finding]:
    """What is missing or too old, and what is newer than tested.

    Args:
        installed: version by name, None where it is not installed.
        on_gpu: whether triton is needed.
    """
    from packaging.version import Version

    findings = []
    for name, (oldest, newest) in TESTED.items():
        if name == "triton" and not on_gpu:
            continue
        found = installed[name]
        if found is None:
            findings.append(Finding(CHECK, f"{name} is not installed", f"install {name}>={oldest}"))
            continue
        parts = Version(newest).release
        if Version(found) < Version(oldest):
            why = f": {WHY[name]}" if name in WHY else ""
            findings.append(Finding(CHECK, f"{name} {found} is older than {oldest}{why}", f"install {name}>={oldest}"))
        elif Version(found).release[: len(parts)] > parts:
            remedy = f"compare with a run on {name} {newest} before you trust it"
            findings.append(Finding(CHECK, f"{name} {found} is newer than tested ({newest})", remedy, "warning"))
    return findings
