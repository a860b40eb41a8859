"""Ranks that must make the same calls: under ZeRO-3 each submodule's call gathers its parameters from all of them.

A rank that makes one call more or less than the others waits for a collective that never comes, or meets another one.
Where the number of calls depends on the data (how long the longest answer is, how many positions the head computes),
the ranks agree on it first; one that has nothing left to compute goes on with what it has and discards the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed


@dataclass(frozen=True)
class Lockstep:
    """Agreements among ranks; each is one small collective, which every rank must take part in.

    Attributes:
        device: of the collectives; None = every rank goes its own way, and nothing is communicated.
    """

    device: torch.device | None = None

    @property
    def on(self) -> bool:
        """Whether the ranks go together."""
        return self.device is not None

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return self.most(int(flag)) > 0

    def most(self, count: int) -> int:
        """The largest count of all ranks."""
        if self.device is None:
            return count
        largest = torch.tensor(count, device=self.device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return int(largest)


ALONE = Lockstep()
"""each rank holds the whole model: DDP, ZeRO-0 to 2, or one process"""
