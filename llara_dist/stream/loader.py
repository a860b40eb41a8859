"""Steps for one rank: plan → reads → packed micro-batches, made ahead in worker processes, in order."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from llara_dist.errors import InputError
from llara_dist.stream.batch import Batch, collate
from llara_dist.stream.plan import Plan
from llara_dist.stream.prefetch import Prefetcher
from llara_dist.stream.reader import SampleInfo, Samples
from llara_dist.stream.share import Shares, check_world, share_out
from llara_dist.supervision.stop_signals import ignore_stop_signals

Draw = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""(step, keys uint64 [n], passes int16 [n]) → bool [n]: which samples are hybrid; the curriculum's pure draw"""


@dataclass(frozen=True)
class Step:
    """What one rank computes in one optimizer step, with the numbers of the whole global step."""

    index: int
    """optimizer step, from 0"""
    epoch: int
    microbatches: list[Batch]
    """this rank's; equally many on every rank"""
    places: list[tuple[int, int]]
    """of each micro-batch: whose it is and the how many-th of that rank, from 0; dropout is seeded with both"""
    samples: int
    """of the global step, like all that follows"""
    hybrid_samples: int
    answer_tokens: int
    """labels: the loss of the step is the sum over them divided by this number"""
    tokens: int
    """positions computed, without stand-ins"""
    padding_share: float
    """share of positions in which a rank waits: 1 - tokens / (sum over the micro-batches that run at the same time of
    ranks x the longest of them). Packed rows hold no padding of their own, so one rank alone has 0."""
    keys: np.ndarray
    """uint64 [samples], in the plan's order"""

    def pin_memory(self) -> Step:
        """The same step with its batches in page-locked memory."""
        return replace(self, microbatches=[batch.pin_memory() for batch in self.microbatches])


@dataclass(frozen=True)
class SharedStep:
    """A step's samples before any is read, and who computes which. Arrays [n] in the plan's order."""

    ids: np.ndarray
    """int64"""
    info: SampleInfo
    hybrid: np.ndarray
    """bool"""
    lengths: np.ndarray
    """int64: positions in the form that was drawn"""
    shares: Shares


@dataclass(frozen=True)
class StepMaker:
    """Makes any step of a plan for one rank; the same in every process."""

    shards: Samples
    plan: Plan
    draw: Draw
    rank: int
    nodes: tuple[int, ...]
    """ranks of each node"""
    max_tokens_per_microbatch: int

    def make(self, index: int) -> Step:
        """Read and pack what this rank computes in step `index`."""
        return self._read(index, self.share(index, only=self.rank), range(self.rank, self.rank + 1))

    def make_whole(self, index: int) -> Step:
        """Read and pack what all ranks compute in step `index`, one rank after the other."""
        return self._read(index, self.share(index), range(sum(self.nodes)))

    def share(self, index: int, only: int | None = None) -> SharedStep:
        """Who computes what of step `index`; no sample is read.

        Args:
            index: optimizer step.
            only: the one rank whose rows are wanted, see `share_out`.
        """
        ids = self.plan.step(index)
        info = self.shards.lookup(ids)
        hybrid = np.asarray(self.draw(index, info.keys, info.passes), dtype=bool)
        lengths = info.tokens - np.where(hybrid, 0, info.slots)
        homes = self.plan.homes(index, sum(self.nodes)) if len(self.nodes) > 1 else None
        shares = share_out(lengths, self.nodes, homes, self.max_tokens_per_microbatch, only=only)
        return SharedStep(ids, info, hybrid, lengths, shares)

    def _read(self, index: int, found: SharedStep, ranks: range) -> Step:
        ids, hybrid, loads = found.ids, found.hybrid, found.shares.loads
        parts = [(rank, turn, part) for rank in ranks for turn, part in enumerate(found.shares.rows[rank])]
        tokens = int(found.lengths.sum())
        return Step(
            index=index,
            epoch=self.plan.epoch(index),
            microbatches=[collate(self.shards.read(ids[part]), hybrid[part]) for _, _, part in parts],
            places=[(rank, turn) for rank, turn, _ in parts],
            samples=len(ids),
            hybrid_samples=int(hybrid.sum()),
            answer_tokens=int(found.info.answer_tokens.sum()),
            tokens=tokens,
            padding_share=1.0 - tokens / (len(loads) * int(loads.max(axis=0).sum())),
            keys=found.info.keys,
        )


class _Steps(Dataset):
    """Step numbers as a map-style data set, so that DataLoader's workers make whole steps and its order holds."""

    def __init__(self, maker: StepMaker, first: int, last: int) -> None:
        self.maker, self.first, self.last = maker, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, position: int) -> Step | InputError:
        try:
            return self.maker.make(self.first + position)
        except InputError as error:
            # Returned, not raised: DataLoader would wrap the one clear line into a worker's traceback.
            error.everywhere = False  # another rank reads other samples
            return error


def _outlive_stop_signals(worker: int) -> None:
    # Launchers and schedulers signal the whole process group; the training process asks for steps until its own end.
    ignore_stop_signals()


def _first(steps: list[Any]) -> Any:
    return steps[0]


class StepLoader:
    """Iterates over the steps [first_step, last_step) of a plan for one rank; each iteration starts at first_step.

    The steps are the same for any number of workers. Worker processes only read files and arrays.

    Args:
        shards: what `plan` was made for.
        plan: the run's plan.
        draw: which samples are hybrid; with workers it must be picklable.
        rank: this rank, from 0.
        world_size: ranks.
        max_tokens_per_microbatch: budget of a packed row, positions.
        nodes: ranks of each node, in the order of ranks, where each node has its own copy of the shards; by default
            all ranks read the same files, and rows are balanced over all of them.
        first_step: where to begin (a resumed run).
        num_workers: processes that prepare steps; 0 makes them in the loop's own process.
        last_step: where to stop, exclusive; the plan's end by default.
        pin_memory: whether batches come in page-locked memory (for a GPU).
        lookahead: told of each step that is handed out, and closed at the end.

    Raises:
        InputError: more ranks than samples in a global batch, or a row that exceeds the budget.
    """

    def __init__(
        self,
        shards: Samples,
        plan: Plan,
        draw: Draw,
        rank: int = 0,
        world_size: int = 1,
        max_tokens_per_microbatch: int = 8192,
        nodes: tuple[int, ...] | None = None,
        first_step: int = 0,
        num_workers: int = 0,
        last_step: int | None = None,
        pin_memory: bool = False,
        lookahead: Prefetcher | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        nodes = nodes or (world_size,)
        if sum(nodes) != world_size:
            raise ValueError(f"nodes {nodes} are {sum(nodes)} ranks, the world has {world_size}")
        last = plan.num_steps if last_step is None else min(last_step, plan.num_steps)
        if not 0 <= first_step <= last:
            raise InputError(f"first step {first_step} is not within the plan's steps 0..{last}")
        check_world(shards.longest, plan.global_batch, world_size, max_tokens_per_microbatch)
        self.maker = StepMaker(shards, plan, draw, rank, nodes, max_tokens_per_microbatch)
        self._steps = _Steps(self.maker, first_step, last)
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._lookahead = lookahead

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Step]:
        try:
            for step in self._make_steps():
                if self._lookahead is not None:
                    self._lookahead.at_step(step.index)
                yield step
        finally:
            if self._lookahead is not None:
                self._lookahead.close()

    def _make_steps(self) -> Iterator[Step]:
        if self._num_workers == 0:
            for index in range(self._steps.first, self._steps.last):
                step = self.maker.make(index)
                yield step.pin_memory() if self._pin_memory else step
            return
        loader = DataLoader(
            self._steps,
            batch_size=1,
            shuffle=False,
            num_workers=self._num_workers,
            collate_fn=_first,
            worker_init_fn=_outlive_stop_signals,
            prefetch_factor=2,
            pin_memory=self._pin_memory,
            # spawn: the parent may hold a CUDA context, communication threads and Arrow's pools.
            multiprocessing_context="spawn",
        )
        steps = iter(loader)
        # Whoever leaves Python with an error that nobody caught still holds the loader: multiprocessing would send the
        # workers a SIGTERM, which they outlive, and wait for them.
        end: Callable[[], None] = steps._shutdown_workers  # pyright: ignore[reportAttributeAccessIssue]
        atexit.register(end)
        try:
            for step in steps:
                if isinstance(step, InputError):
                    raise step
                yield step
        finally:
            end()
            atexit.unregister(end)
