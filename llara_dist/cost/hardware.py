"""What GPUs can do, from their vendor's data sheets, and what this machine's CPU does, measured."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from llara_dist.console import GIB
from llara_dist.errors import InputError


@dataclass(frozen=True)
class Hardware:
    """One accelerator and its links; rates are peaks.

    Attributes:
        name: as people say it.
        memory_bytes: what a process can use of it.
        flops: dense bfloat16 FLOP/s of matrix products (float32 on the CPU).
        float32_flops: dense float32 FLOP/s, no TF32.
        memory_bandwidth: bytes/s of its own memory.
        intra_node: bytes/s that it sends to its peers in the node, one direction.
        inter_node: bytes/s of its share of the node's network, one direction.
        device_type: cuda or cpu.
    """

    name: str
    memory_bytes: int
    flops: float
    float32_flops: float
    memory_bandwidth: float
    intra_node: float
    inter_node: float
    device_type: str = "cuda"

    def peak(self, bfloat16: bool) -> float:
        """FLOP/s of matrix products in bfloat16, else in float32."""
        return self.flops if bfloat16 else self.float32_flops


def _gpu(
    name: str, gib: float, tflops: float, float32: float, gb_per_s: float, link: float, network: float
) -> Hardware:
    return Hardware(name, int(gib * GIB), tflops * 1e12, float32 * 1e12, gb_per_s * 1e9, link * 1e9, network * 1e9)


GPUS = {
    "a100-40": _gpu("A100 SXM 40 GB", 39.4, 312, 19.5, 1555, 300, 25),
    "a100": _gpu("A100 SXM 80 GB", 79.1, 312, 19.5, 2039, 300, 25),
    "h100-pcie": _gpu("H100 PCIe", 79.1, 756, 51, 2000, 64, 25),
    "h100": _gpu("H100 SXM", 79.1, 989, 67, 3350, 450, 50),
    "h200": _gpu("H200 SXM", 139.8, 989, 67, 4800, 450, 50),
    "b200": _gpu("B200", 178.0, 2250, 75, 7700, 900, 50),
    "l4": _gpu("L4", 22.0, 121, 30.3, 300, 32, 3),
    "l40s": _gpu("L40S", 44.4, 362, 91.6, 864, 32, 12.5),
    "rtx-3090": _gpu("GeForce RTX 3090", 23.6, 71, 35.6, 936, 32, 3),
    "rtx-4090": _gpu("GeForce RTX 4090", 23.6, 165, 82.6, 1008, 32, 3),
}
"""NVIDIA's data sheets: memory, dense bfloat16 with float32 accumulation, float32 without TF32, memory bandwidth, and
NVLink (or PCIe x16) in one direction. Memory is what drivers leave of the nominal size; the network is assumed (one 200
or 400 Gb/s port a GPU in data-centre nodes, shared 100 Gb/s Ethernet else) and has an option of its own."""

_DEVICE_NAMES = (
    (r"\bA100\b.*\b40GB", "a100-40"),
    (r"\bA100\b.*\b80GB", "a100"),
    (r"\bH100 PCIe\b", "h100-pcie"),
    (r"\bH100 (80GB HBM3|SXM)", "h100"),
    (r"\bH200\b", "h200"),
    (r"\bB200\b", "b200"),
    (r"\bL40S\b", "l40s"),
    (r"\bL4\b", "l4"),
    (r"\bRTX 3090\b", "rtx-3090"),
    (r"\bRTX 4090\b", "rtx-4090"),
)
_OTHER_SHEET = re.compile(r"\b(MIG|NVL|Laptop|Ti|4090 D)\b")
"""variants of the same name with other rates: parts of a GPU, paired boards, notebooks"""


def find_gpu(name: str) -> Hardware:
    """The GPU type of that name, case ignored.

    Raises:
        InputError: none; lists what there is.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise InputError(f"--gpu {name}: unknown; known are {', '.join(GPUS)}")
    return found


def peak_flops(device_name: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a device, for MFU.

    Args:
        device_name: what `torch.cuda.get_device_name` says.

    Returns:
        The data sheet's; None for a device that is not in the table: no utilisation can be given there.
    """
    if _OTHER_SHEET.search(device_name):
        return None
    for pattern, name in _DEVICE_NAMES:
        if re.search(pattern, device_name):
            return GPUS[name].flops
    return None


def measure_cpu(size: int = 1024, repeats: int = 5) -> Hardware:
    """One core of this machine: the best of a few float32 matrix products and of a few copies (about a second).

    Rates are by CPU seconds of this process, so that other work on the core does not lower them.

    Args:
        size: of the square matrices.
        repeats: of each; the best counts.
    """
    import torch

    left, right = torch.randn(size, size), torch.randn(size, size)
    block = torch.empty(16 * 2**20, dtype=torch.float32).fill_(1.0)
    copy = torch.empty_like(block)
    product = _best_seconds(lambda: left @ right, repeats)
    moved = _best_seconds(lambda: copy.copy_(block), repeats)
    # gloo over loopback copies through the same memory, a few times.
    bandwidth = 2 * block.nbytes / moved
    flops = 2 * size**3 / product
    return Hardware("cpu", 0, flops, flops, bandwidth, bandwidth / 8, bandwidth / 8, "cpu")


def _best_seconds(work: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats + 1):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best
