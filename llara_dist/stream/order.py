"""The order of one source's samples in one epoch: permuted shards, permuted blocks in them, cut into lanes.

Reading is cheap where it is contiguous and a node need not have every shard, and yet a step must be a fair draw of the
whole epoch. So the shards are put in a hashed order, the blocks of each shard too (a block is a run of at least
256 KiB), and the sequence is cut into a fixed number of *lanes* of equal length. Every step draws equally from all
lanes. A node that computes the samples of some lanes reads the shards under these lanes only. A shard's own order is a
shuffle over all users already (`llara_dist.data.shard_writing`), so a block is a fair draw as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from llara_dist.hashing import hash64, text_seed

LANES = 128
"""lanes of a plan unless told otherwise: a node of up to 128 has its own"""
BLOCK_BYTES = 256 * 1024

_SHARD = text_seed("llara_dist/order/shard")
_BLOCK = text_seed("llara_dist/order/block")
_ROTATION = text_seed("llara_dist/order/rotation")


@dataclass(frozen=True)
class Source:
    """A shard set as a plan sees it; arrays [shards]."""

    hash: str
    """names the content"""
    first_ids: np.ndarray
    """int64: id of each shard's first sample"""
    samples: np.ndarray
    """int64"""
    bytes: np.ndarray
    """int64"""
    passes: np.ndarray
    """int64: which pass a shard belongs to"""
    weight: Fraction = Fraction(1)
    """passes that an epoch reads"""

    @cached_property
    def num_passes(self) -> int:
        """How many different passes there are; pass q of a run is pass q mod this."""
        return int(self.passes.max(initial=-1)) + 1

    def pass_size(self, number: int) -> int:
        """Samples of a run's pass."""
        return int(self.samples[self.passes == number % self.num_passes].sum())

    def segments(self, epoch: int) -> list[tuple[int, int, int]]:
        """What epoch e reads of the endless row of passes, [e w, (e + 1) w): (pass, from sample, to sample) of each."""
        begin, end = epoch * self.weight, (epoch + 1) * self.weight
        found = []
        for number in range(int(begin), -int(-end // 1)):
            size = self.pass_size(number)
            start, stop = (int(size * min(max(edge - number, Fraction(0)), Fraction(1))) for edge in (begin, end))
            if stop > start:
                found.append((number, start, stop))
        return found

    def epoch_size(self, epoch: int) -> int:
        """Samples of an epoch."""
        return sum(stop - start for _, start, stop in self.segments(epoch))


@dataclass(frozen=True)
class EpochOrder:
    """A source's epoch: position t → sample id. Arrays [runs], one run a block (or what an epoch's end leaves of it).

    Position t lies in lane `reversed bits of (t mod lanes)`, t // lanes samples deep: any stretch of positions is
    spread evenly over the lanes, and over every group of neighbouring lanes.
    """

    source: Source
    lanes: int
    firsts: np.ndarray
    """int64: id of the block's first sample"""
    lengths: np.ndarray
    """int32: samples of the whole block"""
    shifts: np.ndarray
    """int32: how far into the (rotated) block the run begins"""
    ends: np.ndarray
    """int64: samples of this and all earlier runs"""

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @cached_property
    def lane_of_slot(self) -> np.ndarray:
        """int64 [lanes], its own inverse."""
        bits = self.lanes.bit_length() - 1
        slots = np.arange(self.lanes)
        return sum((((slots >> bit) & 1) << (bits - 1 - bit) for bit in range(bits)), np.zeros(self.lanes, np.int64))

    @cached_property
    def lane_starts(self) -> np.ndarray:
        """int64 [lanes+1]: where each lane begins in the sequence of runs; lengths differ by one at most."""
        sizes = len(self) // self.lanes + (self.lane_of_slot < len(self) % self.lanes)
        return np.concatenate([[0], np.cumsum(sizes)])

    def lanes_of(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n]: the lane of each position."""
        return self.lane_of_slot[positions % self.lanes]

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n]: the sample at each position."""
        places = self.lane_starts[self.lanes_of(positions)] + positions // self.lanes
        runs = np.searchsorted(self.ends, places, side="right")
        begins = np.where(runs > 0, self.ends[runs - 1], 0)
        return self.firsts[runs] + (self.shifts[runs] + places - begins) % self.lengths[runs]

    def spans(self, first_lane: int, last_lane: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """When the shards under the lanes [first_lane, last_lane) are read.

        Returns:
            shard, first position and last position of each stretch of a lane that lies in one shard; int64 each.
        """
        begin, end = (int(self.lane_starts[lane]) for lane in (first_lane, last_lane))
        inner = self.ends[(self.ends > begin) & (self.ends < end)]
        cuts = np.unique(np.concatenate([self.lane_starts[first_lane : last_lane + 1], inner]))
        starts, stops = cuts[:-1], cuts[1:]
        lanes = np.searchsorted(self.lane_starts, starts, side="right") - 1
        blocks = self.firsts[np.searchsorted(self.ends, starts, side="right")]
        shards = np.searchsorted(self.source.first_ids, blocks, side="right") - 1
        new = np.concatenate([[True], (np.diff(shards) != 0) | (np.diff(lanes) != 0)])[: len(starts)]
        heads = np.flatnonzero(new)
        tails = np.append(heads[1:], len(starts))[: len(heads)] - 1
        slots = self.lane_of_slot[lanes[heads]]
        offsets = self.lane_starts[lanes[heads]]
        first = (starts[heads] - offsets) * self.lanes + slots
        last = (stops[tails] - 1 - offsets) * self.lanes + slots
        return shards[heads], first, last


def epoch_order(source: Source, number: int, epoch: int, seed: int, lanes: int = LANES) -> EpochOrder:
    """The order of a source's epoch, a pure function of its arguments.

    Args:
        source: the shard set.
        number: its place in the mixture, from 0.
        epoch: from 0.
        seed: the run's.
        lanes: a power of two.
    """
    parts = [_part(source, seed, number, *segment) for segment in source.segments(epoch)]
    firsts, lengths, shifts, sizes = (
        np.concatenate([np.zeros(0, np.int64), *(part[column] for part in parts)]) for column in range(4)
    )
    # Every process of every rank holds this: 24 bytes a block.
    return EpochOrder(source, lanes, firsts, lengths.astype(np.int32), shifts.astype(np.int32), np.cumsum(sizes))


def _part(source: Source, seed: int, number: int, turn: int, start: int, stop: int) -> tuple[np.ndarray, ...]:
    """Runs of the samples [start, stop) of a run's pass `turn`: firsts, lengths, shifts, sizes."""
    shards = np.flatnonzero((source.passes == turn % source.num_passes) & (source.samples > 0))
    samples = source.samples[shards]
    per_block = np.maximum(1, -(-BLOCK_BYTES * samples // source.bytes[shards]))
    blocks = np.maximum(1, samples // per_block)
    owner = np.repeat(np.arange(len(shards)), blocks)
    block = np.arange(len(owner)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    begins = block * samples[owner] // blocks[owner]
    lengths = (block + 1) * samples[owner] // blocks[owner] - begins
    order = np.lexsort(
        (
            hash64(_BLOCK, seed, number, turn, shards[owner], block),
            owner,
            hash64(_SHARD, seed, number, turn, shards)[owner],
        )
    )
    owner, lengths = owner[order], lengths[order]
    firsts = source.first_ids[shards[owner]] + begins[order]
    # A rotation by epoch, so that samples at the same depth of two blocks do not meet in every epoch.
    shifts = (hash64(_ROTATION, seed, number, turn, firsts) % lengths.astype(np.uint64)).astype(np.int64)
    ends = np.cumsum(lengths)
    sizes = np.minimum(ends, stop) - np.maximum(ends - lengths, start)
    skipped = np.maximum(start - (ends - lengths), 0)
    kept = sizes > 0
    return firsts[kept], lengths[kept], (shifts + skipped)[kept], sizes[kept]
