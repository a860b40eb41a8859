"""Who computes what of a step: rows packed into micro-batches, balanced over the ranks, equally many on each."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llara_dist.errors import InputError

_Bin = tuple[int, list[int]]
"""positions, rows"""


@dataclass(frozen=True)
class Shares:
    """A step's rows by rank and micro-batch."""

    rows: list[list[np.ndarray]]
    """per rank one int64 array of row numbers a micro-batch, increasing; equally many on all ranks, some empty"""
    loads: np.ndarray
    """int64 [ranks, micro-batches]: positions"""


def share_out(
    lengths: np.ndarray, nodes: Sequence[int], homes: np.ndarray | None, max_tokens: int, only: int | None = None
) -> Shares:
    """Pack rows into micro-batches of at most `max_tokens` positions, K a rank, K as small as found.

    Rows stay on the node that they belong to, and are balanced over its ranks. Longest row first into the lightest
    micro-batch (Graham's LPT rule) where that keeps the budget, else into the fullest that holds it (best-fit
    decreasing); micro-batches that run at the same time are neighbours in weight, since all wait for the heaviest.

    Args:
        lengths: int [n], positions of each row.
        nodes: ranks of each node, in the order of ranks.
        homes: int [n], the rank in whose node each row is computed; None where there is one node.
        max_tokens: budget of a micro-batch.
        only: the one rank whose `rows` are wanted; the others' stay empty lists. `loads` is always whole.

    Raises:
        InputError: one row alone is longer than `max_tokens`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > max_tokens:
        row = int(lengths.argmax())
        raise InputError(
            f"a row of {int(lengths[row])} tokens does not fit max_tokens_per_microbatch = {max_tokens}; raise it or "
            "rebuild the shards with a lower --max_tokens"
        )
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(nodes)
    if homes is None or len(nodes) == 1:
        orders = [order.tolist()]
    else:
        node = np.searchsorted(ends, homes[order], side="right")
        orders = [order[node == number].tolist() for number in range(len(nodes))]
    weights = lengths.tolist()
    packed = [_pack(rows, weights, ranks, max_tokens) for rows, ranks in zip(orders, nodes, strict=True)]
    turns = max(len(bins) // ranks for bins, ranks in zip(packed, nodes, strict=True))
    shares = Shares([[] for _ in range(int(ends[-1]))], np.zeros((int(ends[-1]), turns), dtype=np.int64))
    for rows, ranks, bins, end in zip(orders, nodes, packed, ends.tolist(), strict=True):
        if len(bins) < ranks * turns:
            # Another node needs more micro-batches: spread these rows over as many.
            bins = _lightest_first(rows, weights, ranks * turns, max_tokens) or bins + [(0, [])] * (
                ranks * turns - len(bins)
            )
        _deal(bins, range(end - ranks, end), shares, only)
    return shares


def _pack(order: list[int], weights: list[int], ranks: int, limit: int) -> list[_Bin]:
    """Rows (longest first) in ranks × K bins, K as small as found."""
    total = sum(weights[row] for row in order)
    fewest = max(1, -(-total // (ranks * limit)))
    bins = _lightest_first(order, weights, ranks * fewest, limit)
    if bins is not None:
        return bins
    fitted = _best_fit(order, weights, limit)
    most = -(-len(fitted) // ranks)
    for count in sorted({min(fewest + 1, most), most}):
        bins = _lightest_first(order, weights, ranks * count, limit)
        if bins is not None:
            return bins
    return fitted + [(0, [])] * (ranks * most - len(fitted))


def _deal(bins: list[_Bin], ranks: range, shares: Shares, only: int | None) -> None:
    """Bins to ranks: in each turn the heaviest goes to the rank with the least work so far."""
    bins.sort(key=lambda entry: (-entry[0], entry[1][:1]))
    done = [0] * len(ranks)
    for turn in range(len(bins) // len(ranks)):
        group = bins[turn * len(ranks) : (turn + 1) * len(ranks)]
        lightest = sorted(range(len(ranks)), key=lambda place: (done[place], place))
        for place, (load, rows) in zip(lightest, group, strict=True):
            rank = ranks[place]
            done[place] += load
            shares.loads[rank, turn] = load
            if only is None or only == rank:
                shares.rows[rank].append(np.array(sorted(rows), dtype=np.int64))


def _best_fit(order: list[int], weights: list[int], limit: int) -> list[_Bin]:
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


def _lightest_first(order: list[int], weights: list[int], num_bins: int, limit: int) -> list[_Bin] | None:
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


def check_world(longest: int, global_batch: int, world_size: int, max_tokens: int) -> None:
    """Refuse, before training starts, what could fail in the middle of it.

    Args:
        longest: positions of the longest row.
        global_batch: samples in a step.
        world_size: ranks.
        max_tokens: budget of a micro-batch.

    Raises:
        InputError: more ranks than samples in a global batch, or a row longer than the micro-batch budget.
    """
    if world_size > global_batch:
        raise InputError(
            f"{world_size} ranks for a global batch of {global_batch} samples: some would never compute anything; "
            "raise global_batch or start fewer ranks"
        )
    if longest > max_tokens:
        raise InputError(
            f"the longest row of the shards has {longest} tokens, max_tokens_per_microbatch is {max_tokens}; raise it "
            "or rebuild the shards with a lower --max_tokens"
        )
