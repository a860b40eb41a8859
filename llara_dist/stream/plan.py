"""The plan: which samples make which optimizer step. Pure functions of integers.

The samples of a step and their order depend on (sources, seed, global batch, epochs, lanes, step) alone: not on ranks,
workers, the micro-batch budget or restarts. Who computes them (`homes`, `llara_dist.stream.share`) depends on the
world as well. Any step is found without walking through those before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from llara_dist.errors import InputError
from llara_dist.integrity import sha256_json
from llara_dist.stream.order import LANES, EpochOrder, Source, epoch_order

_RULES = 2
"""raised when the same inputs would give another plan, so that an older checkpoint's plan hash no longer fits"""
_MOST = 2**31
"""samples of an epoch; twice the product of two such numbers still fits 64 bits"""


@dataclass(frozen=True)
class Plan:
    """All optimizer steps of a run.

    Epoch e reads `weight` passes of each source: pass e mod P where that is 1. Every sample of a pass is seen once. A
    step draws from the sources in proportion and equally from the lanes of each. The last step of an epoch may be
    smaller than the global batch; nothing is repeated or dropped to fill it.
    """

    sources: Sequence[Source]
    seed: int
    global_batch: int
    """samples in an optimizer step, over all ranks"""
    epochs: int
    lanes: int = LANES
    """a power of two"""
    _orders: dict[int, list[EpochOrder]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse sizes that give no plan."""
        if self.global_batch < 1 or self.epochs < 1:
            raise InputError(f"global_batch {self.global_batch}, epochs {self.epochs}: both must be at least 1")
        if self.lanes < 1 or self.lanes & (self.lanes - 1):
            raise InputError(f"lanes {self.lanes}: must be a power of two")
        sizes = self._sizes.sum(axis=1)
        if sizes.max() == 0:
            raise InputError("the shard set holds no samples; nothing to train on")
        if sizes.max() >= _MOST:
            raise InputError(f"an epoch of {sizes.max()} samples; at most {_MOST - 1} are supported")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_orders": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @cached_property
    def hash(self) -> str:
        """Hex sha256 of all that decides which samples make which step."""
        return sha256_json(
            {
                "rules": _RULES,
                "sources": [[source.hash, str(source.weight)] for source in self.sources],
                "seed": self.seed,
                "global_batch": self.global_batch,
                "epochs": self.epochs,
                "lanes": self.lanes,
            }
        )

    @cached_property
    def _sizes(self) -> np.ndarray:
        """int64 [epochs, sources]: samples."""
        return np.array([[source.epoch_size(epoch) for source in self.sources] for epoch in range(self.epochs)])

    @cached_property
    def _first_steps(self) -> np.ndarray:
        """int64 [epochs+1]: the first step of each epoch, then the number of steps."""
        return np.concatenate([[0], np.cumsum(-(-self._sizes.sum(axis=1) // self.global_batch))])

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self._first_steps[-1])

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first epoch (all are alike but for a fractional weight's rounding)."""
        return int(self._first_steps[1])

    @property
    def repeats_passes(self) -> bool:
        """Whether prompts and candidates are shown again (more passes read than a source holds)."""
        return any(self.epochs * source.weight > source.num_passes for source in self.sources)

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to, from 0."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of a plan of {self.num_steps} steps")
        return int(np.searchsorted(self._first_steps, step, side="right")) - 1

    def first_step_after_epoch(self, epoch: int) -> int:
        """Where the next epoch begins, or the number of steps."""
        return int(self._first_steps[epoch + 1])

    def step(self, step: int) -> np.ndarray:
        """Sample ids of an optimizer step in order, int64 [n], 1 <= n <= global_batch."""
        orders = self._orders_of(self.epoch(step))
        parts = zip(orders, self._positions(step), strict=True)
        return np.concatenate([order.ids(positions) for order, positions in parts])

    def homes(self, step: int, world_size: int) -> np.ndarray:
        """The rank near which each sample of a step lies, int64 [n]: lanes in order, shared out evenly over the ranks.

        Its node reads the same lanes in all steps, and so reads its own shards.
        """
        orders = self._orders_of(self.epoch(step))
        found = []
        for order, positions in zip(orders, self._positions(step), strict=True):
            place = np.arange(len(positions))
            # The sample is the k-th of m that the step draws from this lane.
            k, m = place // self.lanes, -(-(len(positions) - place % self.lanes) // self.lanes)
            found.append(world_size * (2 * m * order.lanes_of(positions) + 2 * k + 1) // (2 * m * self.lanes))
        return np.concatenate(found)

    def needs(self, first_step: int, ranks: range, world_size: int) -> Iterator[tuple[int, int, int, int]]:
        """Which shards the node with these ranks needs, from `first_step` on, in the order of first need.

        Yields:
            first step, last step, source and the source's shard of each stretch of a lane in a shard.
        """
        first_lane, last_lane = self.lanes * ranks.start // world_size, -(-self.lanes * ranks.stop // world_size)
        for epoch in range(self.epoch(first_step), self.epochs):
            rows = []
            for number, order in enumerate(self._orders_of(epoch)):
                shards, *positions = order.spans(first_lane, last_lane)
                begins, ends = (self._step_of(epoch, number, position) for position in positions)
                rows.append(np.stack([begins, ends, np.full(len(shards), number), shards], axis=1))
            found = np.concatenate(rows)
            found = found[found[:, 1] >= first_step]
            for begin, end, number, shard in found[np.lexsort(found.T[::-1])].tolist():
                yield begin, end, number, shard

    def _orders_of(self, epoch: int) -> list[EpochOrder]:
        if epoch not in self._orders:
            # Two are kept: at an epoch's end the loader looks ahead into the next.
            for old in sorted(self._orders)[:-1]:
                del self._orders[old]
            self._orders[epoch] = [
                epoch_order(source, number, epoch, self.seed, self.lanes) for number, source in enumerate(self.sources)
            ]
        return self._orders[epoch]

    def _positions(self, step: int) -> list[np.ndarray]:
        """Per source the positions in its epoch that make the step, int64."""
        epoch = self.epoch(step)
        sizes = self._sizes[epoch]
        begin = (step - int(self._first_steps[epoch])) * self.global_batch
        end = min(begin + self.global_batch, int(sizes.sum()))
        return [np.arange(*pair) for pair in zip(_deal(sizes, begin), _deal(sizes, end), strict=True)]

    def _step_of(self, epoch: int, number: int, positions: np.ndarray) -> np.ndarray:
        """The step that holds each position of a source's epoch, int64."""
        sizes, first = self._sizes[epoch], int(self._first_steps[epoch])
        low = np.zeros(len(positions), dtype=np.int64)
        high = np.full(len(positions), int(self._first_steps[epoch + 1]) - first - 1)
        while (low < high).any():
            middle = (low + high) // 2
            done = np.minimum((middle + 1) * self.global_batch, sizes.sum())
            beyond = _deal(sizes, done)[number] > positions
            low, high = np.where(beyond, low, middle + 1), np.where(beyond, middle, high)
        return low + first


def _deal(sizes: np.ndarray, done: Any) -> list[Any]:
    """How many of each source are among the first `done` samples of an epoch: in proportion, never going back.

    One source against all that follow, by rounding, then the same among those; `done` is an int or int64 array.
    """
    counts = []
    left, rest = int(sizes.sum()), done
    for size in sizes[:-1].tolist():
        count = (2 * rest * size + left) // (2 * left) if left else rest * 0
        counts.append(count)
        left, rest = left - size, rest - count
    return [*counts, rest]
