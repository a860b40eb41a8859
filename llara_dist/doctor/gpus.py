"""The GPUs: what nvidia-smi says of them, what torch can do with them."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llara_dist.doctor.bounded import ProbeError, ask, call
from llara_dist.doctor.verdicts import error, passed, skipped, warning
from llara_dist.errors import Finding

GIB = 2**30
OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
"""The driver (Linux, x86-64) that a CUDA generation needs at least, by minor-version compatibility: release notes of
the CUDA Toolkit, table "CUDA Toolkit and Minimum Required Driver Version"."""
BF16 = (8, 0)
"""compute capability from which bfloat16 is in hardware (Ampere)"""
_FIELDS = (
    "index,uuid,name,memory.total,memory.used,driver_version,compute_cap,persistence_mode,"
    "ecc.errors.uncorrected.volatile.total,mig.mode.current"
)
_FEWER_FIELDS = "index,uuid,name,memory.total,memory.used,driver_version"
"""what drivers know that are too old for a field of the others"""
_ANSWERS_S = 30.0
"""without persistence mode the driver takes seconds for each GPU to wake up"""
_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi describes it; None or "" where it does not say.

    Attributes:
        index: nvidia-smi's number.
        uuid: names the chip.
        name: of the product.
        memory: bytes.
        used: bytes that are taken.
        driver: its version.
        capability: compute capability.
        persistence: whether the driver stays loaded while nobody uses the GPU.
        ecc_errors: uncorrected memory errors since the driver was loaded.
        mig: whether it is cut into slices.
    """

    index: int
    uuid: str
    name: str
    memory: int
    used: int
    driver: str
    capability: tuple[int, int] | None = None
    persistence: bool | None = None
    ecc_errors: int | None = None
    mig: bool = False


@dataclass(frozen=True)
class TorchGpus:
    """What torch sees.

    Attributes:
        cuda: the CUDA version that it was built with; "" = built without.
        available: whether it finds a GPU and a driver.
        devices: of each visible GPU its name, compute capability, bytes of memory, and what computing on it gave
            ("" = the right result).
        architectures: that its kernels were compiled for: sm_90, compute_90.
        nccl: NCCL's version, "" without.
        error: why it could not be asked.
    """

    cuda: str = ""
    available: bool = False
    devices: Sequence[dict[str, Any]] = ()
    architectures: Sequence[str] = ()
    nccl: str = ""
    error: str = ""


@dataclass(frozen=True)
class GpuFacts:
    """Everything that was found out about this node's GPUs.

    Attributes:
        gpus: nvidia-smi's; None = there is no nvidia-smi.
        smi_error: why nvidia-smi did not answer.
        processes: (uuid, pid, name) of what computes on them.
        xids: (PCI address, number) of the driver's errors in the kernel's log.
        torch: what torch sees.
        device_files: whether /dev/nvidia0 is there.
        visible: CUDA_VISIBLE_DEVICES, None where it is not set.
    """

    gpus: Sequence[Gpu] | None = None
    smi_error: str = ""
    processes: Sequence[tuple[str, int, str]] = ()
    xids: Sequence[tuple[str, int]] = ()
    torch: TorchGpus = field(default_factory=TorchGpus)
    device_files: bool = False
    visible: str | None = None

    @property
    def usable(self) -> int:
        """How many GPUs torch computes on rightly."""
        return sum(not device["problem"] for device in self.torch.devices)


def parse_gpus(text: str, fields: str = _FIELDS) -> list[Gpu]:
    """The GPUs in nvidia-smi's answer (csv, noheader, nounits); what it marks as not available is left out."""
    gpus = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        said = {name: value.strip() for name, value in zip(fields.split(","), row, strict=False) if "N/A" not in value}
        if not said.get("index", "").isdecimal():
            continue
        capability = re.fullmatch(r"(\d+)\.(\d+)", said.get("compute_cap", ""))
        ecc = said.get("ecc.errors.uncorrected.volatile.total", "")
        gpus.append(
            Gpu(
                index=int(said["index"]),
                uuid=said.get("uuid", ""),
                name=said.get("name", "unknown"),
                memory=_mib(said.get("memory.total")),
                used=_mib(said.get("memory.used")),
                driver=said.get("driver_version", ""),
                capability=(int(capability[1]), int(capability[2])) if capability else None,
                persistence={"Enabled": True, "Disabled": False}.get(said.get("persistence_mode", "")),
                ecc_errors=int(ecc) if ecc.isdecimal() else None,
                mig=said.get("mig.mode.current") == "Enabled",
            )
        )
    return gpus


def _mib(text: str | None) -> int:
    return int(text) << 20 if text and text.isdecimal() else 0


def parse_processes(text: str) -> list[tuple[str, int, str]]:
    """(uuid, pid, name) in nvidia-smi's list of compute processes."""
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    return [(row[0], int(row[1]), row[2]) for row in rows if len(row) >= 3 and row[1].strip().isdecimal()]


def parse_xids(kernel_log: str) -> list[tuple[str, int]]:
    """(PCI address, number) of each error that the driver wrote into the kernel's log."""
    return [(match[1], int(match[2])) for match in _XID.finditer(kernel_log)]


def try_gpus() -> dict[str, Any]:
    """What torch sees and computes; called in a process of its own."""
    import torch
    from torch.cuda.nccl import version

    found: dict[str, Any] = {"cuda": torch.version.cuda or "", "available": torch.cuda.is_available()}
    if not found["available"]:
        return found
    found["architectures"] = torch.cuda.get_arch_list()
    found["nccl"] = ".".join(str(part) for part in version())
    found["devices"] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        problem = ""
        try:
            # Whole numbers, sums up to 256: exact in bfloat16, in whatever order they are added.
            numbers = torch.arange(64.0).remainder(3).repeat(64, 1)
            for dtype in (torch.float32, *([torch.bfloat16] if (properties.major, properties.minor) >= BF16 else [])):
                product = (numbers.to(index, dtype) @ numbers.T.to(index, dtype)).cpu().float()
                if not torch.equal(product, (numbers @ numbers.T).to(dtype).float()):
                    problem = f"wrong product in {str(dtype).removeprefix('torch.')}"
        except RuntimeError as raised:
            problem = str(raised).strip().splitlines()[0]
        found["devices"].append(
            {
                "name": properties.name,
                "capability": [properties.major, properties.minor],
                "memory": properties.total_memory,
                "problem": problem,
            }
        )
    return found


def probe() -> GpuFacts:
    """Ask nvidia-smi, the kernel's log and torch."""
    gpus, smi_error, processes, xids = None, "", [], []
    try:
        gpus, smi_error = _ask_smi()
        if gpus:
            listed = ask(
                ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name", "--format=csv,noheader"], _ANSWERS_S
            )
            processes = parse_processes(listed.out) if listed else []
            log = ask(["dmesg"], 5.0)
            xids = parse_xids(log.out) if log else []
    except ProbeError as silent:
        smi_error = str(silent)
    try:
        seen = TorchGpus(**call(try_gpus, 120.0 + 15.0 * len(gpus or ())))
    except ProbeError as silent:
        seen = TorchGpus(error=str(silent))
    return GpuFacts(
        gpus=gpus,
        smi_error=smi_error,
        processes=processes,
        xids=xids,
        torch=seen,
        device_files=Path("/dev/nvidia0").exists(),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def _ask_smi() -> tuple[list[Gpu] | None, str]:
    for fields in (_FIELDS, _FEWER_FIELDS):
        answer = ask(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"], _ANSWERS_S)
        if answer is None:
            return None, ""
        if answer.code == 0:
            return parse_gpus(answer.out, fields), ""
        said = (answer.out.strip().splitlines() or [answer.last_error])[-1]
        if "not a valid field" not in answer.out:
            return [], said
    return [], said


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
