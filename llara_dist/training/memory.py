"""How much memory this process has needed."""

from __future__ import annotations

import resource

import torch


def peak_memory_mib(device: torch.device) -> float:
    """Peak MiB: allocated on the GPU, or resident in memory on the CPU (Linux reports ru_maxrss in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
