"""Where a sample occurs in a run: a walk through the plan, no sample is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from llara_dist.replay.history import Layout
from llara_dist.stream.loader import Draw, StepMaker
from llara_dist.stream.plan import Plan
from llara_dist.stream.reader import Samples

_CHUNK = 1 << 20
"""samples whose keys are looked up at once"""


@dataclass(frozen=True)
class Occurrence:
    """One time that a run computes a sample.

    Attributes:
        step: optimizer step.
        epoch: from 0.
        pass_index: which draw of template and candidates.
        rank: that computes it.
        microbatch: of the rank, from 0.
        form: hybrid or text-only.
    """

    step: int
    epoch: int
    pass_index: int
    rank: int
    microbatch: int
    form: str


def ids_of_key(shards: Samples, key: int) -> np.ndarray:
    """Sample ids of a key as batches give it, one a pass; int64 [n], empty where there is none."""
    found = []
    for begin in range(0, len(shards), _CHUNK):
        ids = np.arange(begin, min(begin + _CHUNK, len(shards)))
        found.append(ids[shards.lookup(ids).keys.astype(np.int64) == key])
    return np.concatenate(found)


def occurrences(
    ids: np.ndarray, shards: Samples, plan: Plan, draw: Draw, layout: Callable[[int], Layout], total_steps: int
) -> Iterator[Occurrence]:
    """Every time that a run computes one of some samples, by step.

    Args:
        ids: of the samples, int64 [n].
        shards: what the plan was made for.
        plan: of the run.
        draw: which samples are hybrid.
        layout: of a step, how its rows are shared out.
        total_steps: T.
    """
    for step in range(total_steps):
        rows = set(np.flatnonzero(np.isin(plan.step(step), ids)).tolist())
        if not rows:
            continue
        known = layout(step)
        shared = StepMaker(shards, plan, draw, 0, known.nodes, known.max_tokens_per_microbatch).share(step)
        owners = [
            (rank, turn, row)
            for rank, parts in enumerate(shared.shares.rows)
            for turn, part in enumerate(parts)
            for row in part.tolist()
            if row in rows
        ]
        for rank, turn, row in sorted(owners, key=lambda owner: owner[2]):
            yield Occurrence(
                step=step,
                epoch=plan.epoch(step),
                pass_index=int(shared.info.passes[row]),
                rank=rank,
                microbatch=turn,
                form="hybrid" if shared.hybrid[row] else "text-only",
            )
