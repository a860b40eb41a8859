"""What there is of GPUs: nvidia-smi, the kernel's log and torch are asked, each with a time limit."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llara_dist.doctor.bounded import ProbeError, ask, call

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
