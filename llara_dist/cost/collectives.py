"""Collectives that really happen: every call of torch.distributed that a block of code makes, with its bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "reduce", "broadcast"]

_KINDS: dict[str, Kind] = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
}
_IGNORED = {"barrier", "monitored_barrier_"}


@dataclass
class Traffic:
    """Payload by kind of collective.

    Attributes:
        calls: how often.
        bytes: of the whole tensor: what an all-gather puts together, what a reduction reduces.
    """

    calls: Counter[Kind] = field(default_factory=Counter)
    bytes: Counter[Kind] = field(default_factory=Counter)

    def add(self, kind: Kind, size: int, calls: int = 1) -> None:
        """Count `calls` collectives with `size` bytes in all."""
        self.calls[kind] += calls
        self.bytes[kind] += size

    def sent(self, world_size: int) -> float:
        """Bytes that a rank sends, ring algorithms assumed: (W − 1)/W of the payload, twice that for an all-reduce."""
        share = (world_size - 1) / world_size
        return sum(share * size * (2 if kind == "all_reduce" else 1) for kind, size in self.bytes.items())


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives of a block, those of backward hooks included; on each rank its own.

    Raises (inside the block):
        NotImplementedError: a collective whose payload it does not know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def record(self, kind: Kind, size: int) -> None:
        """Count one collective of so many bytes."""
        self.traffic.add(kind, size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and go on."""
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            if name in _KINDS:
                kind = _KINDS[name]
                # The whole tensor is the first argument, but for a reduce-scatter, where it is the second.
                self.record(kind, _nbytes(args[1] if kind == "reduce_scatter" else args[0]))
            elif name not in _IGNORED:
                raise NotImplementedError(f"collective {name}: its payload is not known")
        return func(*args, **(kwargs or {}))


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(_nbytes(part) for part in value)
