"""The GPUs: whether driver, torch and devices fit each other, and what troubles them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llara_dist.console import GIB
from llara_dist.doctor.gpu_facts import BF16, GpuFacts
from llara_dist.doctor.verdicts import error, passed, skipped, warning
from llara_dist.errors import Finding

OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
"""The driver (Linux, x86-64) that a CUDA generation needs at least, by minor-version compatibility: release notes of
the CUDA Toolkit, table "CUDA Toolkit and Minimum Required Driver Version"."""


def check_gpus(facts: GpuFacts) -> list[Finding]:
    """What is there, and whether torch computes on it."""
    torch, gpus = facts.torch, facts.gpus or ()
    if torch.error:
        return [error("GPUs", f"torch: {torch.error}", "mend the installation or the driver; see `nvidia-smi`")]
    if not gpus and not torch.available:
        return [_no_gpu(facts)]
    findings = [*check_driver(facts), *check_computing(facts), *check_state(facts)]
    return findings or [error("GPUs", "none is usable", "see `nvidia-smi`")]


def _no_gpu(facts: GpuFacts) -> Finding:
    if facts.smi_error:
        remedy = "have the driver mended on this node (reboot, reinstall); keep jobs off it until then"
        return error("GPUs", f"nvidia-smi fails: {facts.smi_error}", remedy)
    if facts.device_files:
        remedy = "start the container with its GPUs: docker --gpus all, apptainer --nv, or pyxis"
        return error("GPUs", "/dev/nvidia0 is there, but neither nvidia-smi nor torch reaches it", remedy)
    remedy = "fine for debugging; start where there are GPUs to tune a real model"
    return warning("GPUs", "none: CPU only, for debugging only", remedy)


def check_driver(facts: GpuFacts) -> list[Finding]:
    """The driver runs the CUDA that torch was built with, and torch has kernels for the GPUs."""
    torch, gpus = facts.torch, facts.gpus or ()
    if not torch.cuda:
        return [error("torch", "built without CUDA, but there are GPUs", "install torch's CUDA build")]
    generation = int(torch.cuda.partition(".")[0])
    oldest = OLDEST_DRIVER.get(generation)
    driver = gpus[0].driver if gpus else ""
    numbers = tuple(int(part) for part in re.findall(r"\d+", driver)[:2])
    if numbers and oldest and numbers < oldest:
        needed = ".".join(str(part) for part in oldest)
        remedy = f"have the driver updated to {oldest[0]} or newer, or install torch for an older CUDA"
        return [error("driver", f"{driver} is too old for torch's CUDA {torch.cuda}: needs ≥ {needed}", remedy)]
    if not torch.available:
        if facts.visible is not None and facts.visible.strip() in ("", "-1"):
            return [error("driver", f"CUDA_VISIBLE_DEVICES={facts.visible!r} hides every GPU", "unset it")]
        remedy = "see `python -c 'import torch; torch.cuda.init()'` for the driver's own words"
        return [error("driver", f"torch finds no usable GPU among {len(gpus)} (driver {driver or 'unknown'})", remedy)]
    foreign = sorted(
        {device["name"] for device in torch.devices if not has_kernels(device["capability"], torch.architectures)}
    )
    if foreign:
        remedy = f"install a torch whose kernels suit the GPU; this one has {', '.join(torch.architectures)}"
        return [error("driver", f"torch has no kernels for {', '.join(foreign)}", remedy)]
    return [passed("driver", f"{driver or 'unknown'}, runs torch's CUDA {torch.cuda}")]


def has_kernels(capability: Sequence[int], architectures: Sequence[str]) -> bool:
    """Whether code compiled for `architectures` runs on a GPU: same major version, or PTX that is no newer."""
    major, minor = capability
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        match = re.match(r"(\d+)(\d)", number)
        if match is None:
            continue
        built = (int(match[1]), int(match[2]))
        if (kind == "sm" and built[0] == major and built[1] <= minor) or (
            kind == "compute" and built <= (major, minor)
        ):
            return True
    return not architectures


def check_computing(facts: GpuFacts) -> list[Finding]:
    """Each visible GPU multiplies rightly; all are of one kind; bfloat16."""
    devices = facts.torch.devices
    if not devices:
        return []
    findings = [
        error("computing", f"GPU {number} ({device['name']}): {device['problem']}", "take the node out of service")
        for number, device in enumerate(devices)
        if device["problem"]
    ]
    kinds: dict[str, int] = {}
    for device in devices:
        kind = f"{device['name']} ({device['memory'] / GIB:.0f} GiB)"
        kinds[kind] = kinds.get(kind, 0) + 1
    shown = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
    hidden = len(facts.gpus or ()) - len(devices)
    if hidden > 0 and facts.visible is not None:
        shown += f"; {hidden} more hidden by CUDA_VISIBLE_DEVICES={facts.visible}"
    if len(kinds) > 1:
        findings.append(warning("GPUs", shown, "every step waits for the slowest kind: use one kind for a run"))
    else:
        findings.append(passed("GPUs", shown))
    without = sorted({device["name"] for device in devices if tuple(device["capability"]) < BF16})
    if without:
        found = f"{', '.join(without)}: no bfloat16 (compute capability below {BF16[0]}.{BF16[1]})"
        remedy = "set model.compute_dtype=float32; slow: better take newer GPUs"
        findings.append(warning("bfloat16", found, remedy))
    elif not any(device["problem"] for device in devices):
        findings.append(passed("computing", "float32 and bfloat16 products are right on each"))
    return findings


def check_state(facts: GpuFacts) -> list[Finding]:
    """Others' processes, memory errors, the driver's errors, persistence, slices."""
    gpus = facts.gpus or ()
    findings = []
    for gpu in gpus:
        there = [f"{name} (pid {pid})" for uuid, pid, name in facts.processes if uuid == gpu.uuid]
        taken = f"{gpu.used / GIB:.1f} of {gpu.memory / GIB:.0f} GiB taken"
        remedy = "end them, or take another node"
        if there:
            more = f" and {len(there) - 3} more" if len(there) > 3 else ""
            findings.append(warning("in use", f"GPU {gpu.index}: {', '.join(there[:3])}{more}, {taken}", remedy))
        elif gpu.memory and gpu.used > max(2 * GIB, 0.05 * gpu.memory):
            # Processes of other containers are not listed, their memory is.
            found = f"GPU {gpu.index}: {taken} by processes that cannot be seen from here"
            findings.append(warning("in use", found, "look from outside the container; " + remedy))
        if gpu.ecc_errors:
            found = f"GPU {gpu.index}: {gpu.ecc_errors} uncorrected memory errors since the driver was loaded"
            findings.append(error("memory errors", found, "reset the GPU or take the node out of service"))
    if facts.xids:
        places = sorted({f"Xid {number} at PCI {place}" for place, number in facts.xids})
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        remedy = "look the number up in NVIDIA's list of Xid errors; 48, 63, 64, 74, 79, 94, 95 mean broken hardware"
        findings.append(warning("driver errors", ", ".join(places[:4]) + more + " in the kernel's log", remedy))
    asleep = [str(gpu.index) for gpu in gpus if gpu.persistence is False]
    if asleep:
        found = f"persistence mode is off (GPU {', '.join(asleep)}): each start waits for the driver"
        findings.append(warning("persistence", found, "as root: nvidia-smi -pm 1"))
    sliced = [str(gpu.index) for gpu in gpus if gpu.mig]
    if sliced:
        found = f"GPU {', '.join(sliced)} is cut into MIG slices, between which NCCL does not work"
        findings.append(warning("MIG", found, "one rank a node only, or have MIG switched off"))
    if gpus and not findings:
        findings.append(passed("state", "idle, no memory errors"))
    return findings


def examine(facts: GpuFacts) -> list[Finding]:
    """The topic's findings; NCCL's version is said with the links."""
    findings = check_gpus(facts)
    if facts.torch.available and facts.gpus is None:
        findings.append(skipped("nvidia-smi", "not here: driver, errors and other processes were not looked at"))
    elif facts.torch.available and facts.smi_error:
        found = f"fails: {facts.smi_error}; errors and other processes were not looked at"
        findings.append(warning("nvidia-smi", found, "have the driver mended on this node"))
    return findings
