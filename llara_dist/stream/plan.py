"""The plan: which samples make which optimizer step, and who computes them. Pure functions of integers.

The samples of a step and their order depend on (shard set, seed, global batch, epochs, step) alone: not on ranks,
workers, the micro-batch budget or restarts. Who computes them depends on the world size and the budget as well.
"""

from __future__ import annotations

import bisect
import heapq
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from llara_dist.errors import InputError
from llara_dist.hashing import permutation, text_seed
from llara_dist.integrity import sha256_json

_ORDER = text_seed("llara_dist/plan/epoch")
_RULES = 1
"""raised when the same inputs would give another plan, so that an older checkpoint's plan hash no longer fits"""


class SampleTable(Protocol):
    """What a plan needs to know about samples; `ShardSet` is one. Arrays [n] by sample id."""

    @property
    def hash(self) -> str: ...
    @property
    def num_passes(self) -> int: ...
    @property
    def keys(self) -> np.ndarray: ...
    @property
    def passes(self) -> np.ndarray: ...
    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def slots(self) -> np.ndarray: ...
    @property
    def answer_tokens(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Plan:
    """All optimizer steps of a run.

    Epoch e reads pass e mod P in an order hashed from (seed, e); every sample of the pass once. The last step of an
    epoch may be smaller than the global batch; nothing is repeated or dropped to fill it.
    """

    samples: SampleTable
    seed: int
    global_batch: int
    """samples in an optimizer step, over all ranks"""
    epochs: int
    _order: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse sizes that give no plan."""
        if self.global_batch < 1 or self.epochs < 1:
            raise InputError(f"global_batch {self.global_batch}, epochs {self.epochs}: both must be at least 1")
        if len(self.samples.keys) == 0:
            raise InputError("the shard set holds no samples; nothing to train on")

    @cached_property
    def hash(self) -> str:
        """Hex sha256 of all that decides which samples make which step."""
        return sha256_json(
            {
                "rules": _RULES,
                "shards": self.samples.hash,
                "seed": self.seed,
                "global_batch": self.global_batch,
                "epochs": self.epochs,
            }
        )

    @cached_property
    def _ids_of_pass(self) -> list[np.ndarray]:
        return [np.flatnonzero(self.samples.passes == number) for number in range(self.samples.num_passes)]

    @cached_property
    def _first_steps(self) -> np.ndarray:
        """int64 [epochs+1]: the first step of each epoch, then the number of steps."""
        sizes = np.array([len(self._ids_of_pass[epoch % self.samples.num_passes]) for epoch in range(self.epochs)])
        return np.concatenate([[0], np.cumsum(-(-sizes // self.global_batch))])

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self._first_steps[-1])

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first epoch (all are alike: every pass holds the same rows)."""
        return int(self._first_steps[1])

    @property
    def repeats_passes(self) -> bool:
        """Whether an epoch shows prompts and candidates of an earlier one again (more epochs than passes)."""
        return self.epochs > self.samples.num_passes

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to, from 0."""
        self._check(step)
        return int(np.searchsorted(self._first_steps, step, side="right")) - 1

    def step(self, step: int) -> np.ndarray:
        """Sample ids of an optimizer step in order, int64 [n], 1 <= n <= global_batch."""
        epoch = self.epoch(step)
        if epoch not in self._order:
            ids = self._ids_of_pass[epoch % self.samples.num_passes]
            # One epoch is kept: a run walks on, it does not jump.
            self._order.clear()
            self._order[epoch] = ids[permutation(len(ids), _ORDER, self.seed, epoch)]
        start = (step - int(self._first_steps[epoch])) * self.global_batch
        return self._order[epoch][start : start + self.global_batch]

    def microbatches(self, step: int, hybrid: np.ndarray, world_size: int, max_tokens: int) -> list[list[np.ndarray]]:
        """Share a step's samples out over ranks and micro-batches.

        Args:
            step: optimizer step.
            hybrid: bool [n], the draw of each sample of `step(step)`: a text-only row is shorter by its slots.
            world_size: ranks.
            max_tokens: most positions of a packed micro-batch.

        Returns:
            Per rank a list of positions into `step(step)` (int64 [m], increasing), one entry a micro-batch. All ranks
            have equally many; some may be empty.

        Raises:
            InputError: one row alone is longer than `max_tokens`.
        """
        ids = self.step(step)
        lengths = self.samples.tokens[ids] - np.where(hybrid, 0, self.samples.slots[ids])
        return share_out(lengths, world_size, max_tokens)

    def _check(self, step: int) -> None:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of a plan of {self.num_steps} steps")


def share_out(lengths: np.ndarray, world_size: int, max_tokens: int) -> list[list[np.ndarray]]:
    """Pack rows into world_size × K micro-batches of at most `max_tokens` positions, balanced, K as small as found.

    Longest row first into the lightest micro-batch (Graham's LPT rule) where that keeps the budget, else into the
    fullest that holds it (best-fit decreasing); micro-batches that run at the same time on
    different ranks are neighbours in weight, since all ranks wait for the heaviest.

    Args:
        lengths: int [n], positions of each row.
        world_size: ranks.
        max_tokens: budget of a micro-batch.

    Returns:
        Per rank K arrays of row numbers, int64, increasing; some may be empty.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > max_tokens:
        row = int(lengths.argmax())
        raise InputError(
            f"a row of {int(lengths[row])} tokens does not fit max_tokens_per_microbatch = {max_tokens}; raise it or "
            "rebuild the shards with a lower --max_tokens"
        )
    order = np.argsort(-lengths, kind="stable").tolist()
    weights = lengths.tolist()
    fitted = _best_fit(order, weights, max_tokens)
    most = max(1, -(-len(fitted) // world_size))
    fewest = max(1, -(-int(lengths.sum()) // (world_size * max_tokens)))
    bins = None
    for count in sorted({fewest, min(fewest + 1, most), most}):
        bins = _lightest_first(order, weights, world_size * count, max_tokens)
        if bins is not None:
            break
    if bins is None:
        bins = fitted + [(0, [])] * (world_size * most - len(fitted))
    count = len(bins) // world_size
    bins.sort(key=lambda entry: (-entry[0], entry[1][:1]))
    shares: list[list[np.ndarray]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for turn in range(count):
        group = bins[turn * world_size : (turn + 1) * world_size]
        # The heaviest of a turn goes to the rank with the least work so far.
        for rank, (load, rows) in zip(
            sorted(range(world_size), key=lambda rank: (loads[rank], rank)), group, strict=True
        ):
            shares[rank].append(np.array(sorted(rows), dtype=np.int64))
            loads[rank] += load
    return shares


def _best_fit(order: list[int], weights: list[int], limit: int) -> list[tuple[int, list[int]]]:
    """Rows in `order` each into the fullest bin that still holds it: few bins (11/9 of the fewest), not balanced."""
    room: list[tuple[int, int]] = []
    bins: list[list[int]] = []
    for row in order:
        place = bisect.bisect_left(room, (weights[row], -1))
        if place == len(room):
            free, number = limit, len(bins)
            bins.append([])
        else:
            free, number = room.pop(place)
        bins[number].append(row)
        bisect.insort(room, (free - weights[row], number))
    return [(limit - free, bins[number]) for free, number in sorted(room, key=lambda entry: entry[1])]


def _lightest_first(
    order: list[int], weights: list[int], num_bins: int, limit: int
) -> list[tuple[int, list[int]]] | None:
    """Rows in `order` each into the lightest of `num_bins` bins; None when one would exceed the limit."""
    members: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, number) for number in range(num_bins)]
    for row in order:
        load, number = heap[0]
        if load + weights[row] > limit:
            return None
        heapq.heapreplace(heap, (load + weights[row], number))
        members[number].append(row)
    return [(load, members[number]) for load, number in sorted(heap, key=lambda entry: entry[1])]


def check_world(samples: SampleTable, global_batch: int, world_size: int, max_tokens: int) -> None:
    """Refuse, before training starts, what could fail in the middle of it.

    Raises:
        InputError: more ranks than samples in a global batch, or a row longer than the micro-batch budget.
    """
    if world_size > global_batch:
        raise InputError(
            f"{world_size} ranks for a global batch of {global_batch} samples: some would never compute anything; "
            "raise global_batch or start fewer ranks"
        )
    longest = int(samples.tokens.max(initial=0))
    if longest > max_tokens:
        raise InputError(
            f"the longest row of the shards has {longest} tokens, max_tokens_per_microbatch is {max_tokens}; raise it "
            "or rebuild the shards with a lower --max_tokens"
        )
