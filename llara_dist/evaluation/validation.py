"""Validation while training runs: loss and HR@1 on the frozen validation rows, at the same numbers of any world size.

A batch's prompts are read once. The target's likelihood as the answer gives the loss; the answers generated from there,
or the likelihoods of all candidates, give HR@1. The ranks share the rows and sum what they counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llara_dist import distributed
from llara_dist.config import RunConfig
from llara_dist.data.samples import Sample
from llara_dist.data.tokenizer import load_tokenizer
from llara_dist.errors import InputError
from llara_dist.evaluation.answers import answer_text, answer_tokens, check_answer
from llara_dist.evaluation.decode import generate
from llara_dist.evaluation.evaluate import form_is_hybrid
from llara_dist.evaluation.lockstep import ALONE, Lockstep
from llara_dist.evaluation.metrics import judge_exact
from llara_dist.evaluation.prompts import read_prompts
from llara_dist.evaluation.scoring import Likelihoods, score_candidates
from llara_dist.model.hybrid import HybridLlama
from llara_dist.recommenders.ranking import rank_targets
from llara_dist.stream.locations import node_cache, open_samples, parts_of
from llara_dist.stream.reader import Samples
from llara_dist.training.engine import Engine
from llara_dist.training.evaluation_mode import evaluation_mode, is_partitioned
from llara_dist.training.scores import ValidationScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Turn:
    """What a rank computes while each other rank computes as much.

    Fields:
        ids: int64 [n], rows by their places in the split's index.
        counted: false where the rank has no row left and keeps step with one that another rank counts.
    """

    ids: np.ndarray
    counted: bool


def turns_of(ids: np.ndarray, lengths: np.ndarray, rank: int, size: int, batch_size: int) -> list[Turn]:
    """One rank's turns, as many as every other rank's.

    Longest rows first: those of a batch are of similar length. A rank without rows keeps step with the shortest row,
    which is another rank's in the same turn, so that nobody waits for it.

    Args:
        ids: int64 [n], at least one.
        lengths: int [n], positions of each.
        rank: whose.
        size: ranks.
        batch_size: rows of a turn.
    """
    order = ids[np.argsort(-lengths, kind="stable")]
    mine = order[rank::size]
    most = math.ceil(len(order) / size)  # the first rank's rows
    batches = [mine[start : start + batch_size] for start in range(0, most, batch_size)]
    return [Turn(batch, True) if len(batch) else Turn(order[-1:], False) for batch in batches]


@dataclass(frozen=True)
class Tally:
    """What was counted over some rows; sums, so that any split of the rows over ranks gives the same.

    Fields:
        nats: summed cross-entropy of the targets' answers.
        tokens: of those answers, EOS included.
        hits: rows answered right; a tie of likelihoods counts in part.
        valid: generated answers that name a candidate.
        rows: how many.
    """

    nats: float = 0.0
    tokens: int = 0
    hits: float = 0.0
    valid: int = 0
    rows: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


class RunValidator:
    """A run's `Validator` (`training/scores.py`): its rows, shared over the ranks, in the form training ends with.

    Args:
        config: the run; `validation` says how much and how.
        samples: the validation split, open for reading.
        tokenizer: the model's.
        world: where this process stands.
        beat: called for every batch and every generated token, as a sign of life.
        stop_requested: whether this rank was asked to stop; the ranks agree on it before every batch.

    Raises:
        InputError: the split holds no rows.
    """

    def __init__(
        self,
        config: RunConfig,
        samples: Samples,
        tokenizer: PreTrainedTokenizerBase,
        world: distributed.World,
        beat: Callable[[], None] | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        if len(samples) == 0:
            raise InputError(f"{config.data.shards}: the validation split holds no rows; set validation.every_steps=0")
        self._settings = config.validation
        self._hybrid = form_is_hybrid("auto", config)
        self._samples = samples
        self._tokenizer = tokenizer
        self._titles = samples.titles()
        self._answers = answer_tokens(tokenizer, self._titles)
        self._beat = beat or (lambda: None)
        self._stop_requested = stop_requested
        self.measure = {name: getattr(self._settings, name) for name in ("generation", "rows", "max_new_tokens")}
        keys = samples.all.keys
        ids = np.argsort(keys, kind="stable")[: self._settings.rows or None]
        self._turns = [
            turn
            for alike in by_candidates(samples, ids)
            for turn in turns_of(alike, samples.lookup(alike).tokens, world.rank, world.size, self._settings.batch_size)
        ]

    def __call__(self, engine: Engine, step: int) -> ValidationScores | None:
        """Validate after `step` optimizer steps; every rank calls it and gets the same, None where one is to stop.

        Raises:
            InputError: a sample is damaged.
        """
        started = time.perf_counter()
        ranks = Lockstep(engine.device) if engine.world.size > 1 else ALONE
        lockstep = ranks if is_partitioned(engine.model) else ALONE
        tally = Tally()
        with evaluation_mode(engine):
            for turn in self._turns:
                if ranks.any(self._stop_requested()):
                    return None
                if turn.counted or lockstep.on:
                    self._beat()
                    counted = self._validate(engine.model, self._samples.read(turn.ids), lockstep)
                    tally += counted if turn.counted else Tally()
        # Gathered and added in the order of ranks: the same bits everywhere, since all must decide the same on them.
        gathered = distributed.gather_objects((tally, time.perf_counter() - started))
        whole = sum((part for part, _ in gathered), Tally())
        return ValidationScores(
            step=step,
            loss=whole.nats / whole.tokens,
            hit_ratio=whole.hits / whole.rows,
            valid_ratio=whole.valid / whole.rows if self._settings.generation else None,
            rows=whole.rows,
            seconds=round(max(seconds for _, seconds in gathered), 3),
        )

    def _validate(self, model: HybridLlama, samples: list[Sample], lockstep: Lockstep) -> Tally:
        """One batch; its samples show equally many candidates."""
        for sample in samples:
            check_answer(sample, self._answers)
        prompts = read_prompts(model, samples, self._hybrid)
        if not self._settings.generation:
            shown = np.stack([sample.candidates for sample in samples])
            places = np.array([sample.target_index for sample in samples])
            scored = score_candidates(model, prompts, shown, self._answers, lockstep)
            return _tally(scored, places, hits=expected_hits(scored.total, places), valid=0)
        targets = np.array([[sample.target] for sample in samples])
        scored = score_candidates(model, prompts, targets, self._answers, lockstep)
        eos: Any = self._tokenizer.eos_token_id
        generated = generate(model, prompts, eos, self._settings.max_new_tokens, lockstep, self._beat)
        verdicts = [
            judge_exact(
                answer_text(self._tokenizer, answer.tokens),
                self._titles[sample.target],
                [self._titles[int(item)] for item in sample.candidates],
            )
            for answer, sample in zip(generated, samples, strict=True)
        ]
        return _tally(
            scored,
            np.zeros(len(samples), dtype=np.int64),
            hits=sum(verdict.hit for verdict in verdicts),
            valid=sum(verdict.valid for verdict in verdicts),
        )


def open_validator(
    config: RunConfig,
    world: distributed.World,
    beat: Callable[[], None] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> RunValidator | None:
    """The validator that a run's settings ask for, or None; reads no weight.

    Args:
        config: the run.
        world: where this process stands.
        beat: called for every batch and every generated token.
        stop_requested: whether this rank was asked to stop.

    Raises:
        InputError: the validation split cannot be opened or holds no rows.
    """
    if config.validation.every_steps == 0:
        return None
    samples = open_samples(config.data.shards, "val", node_cache(config.data))
    return RunValidator(
        config, samples, load_tokenizer(config.model.path, config.model.revision), world, beat, stop_requested
    )


def expected_hits(scores: np.ndarray, targets: np.ndarray) -> float:
    """Rows whose target is ranked first, ties in part; a row with a NaN score, from a diverged model, is a miss.

    Args:
        scores: float [n, C], higher is better.
        targets: int [n], the target's column.
    """
    known = ~np.isnan(scores).any(axis=1)
    return float(rank_targets(scores[known], targets[known]).hits(1).sum())


def _tally(scored: Likelihoods, columns: np.ndarray, hits: float, valid: int) -> Tally:
    """Counts of a batch whose targets' likelihoods stand in `columns`, int [n]."""
    rows = np.arange(len(columns))
    return Tally(
        nats=-float(scored.total[rows, columns].sum()),
        tokens=int(scored.tokens[rows, columns].sum()),
        hits=hits,
        valid=valid,
        rows=len(columns),
    )


def by_candidates(samples: Samples, ids: np.ndarray) -> Sequence[np.ndarray]:
    """The rows in groups that show equally many candidates; a mixture's data sets may differ."""
    parts = parts_of(samples)
    widths = np.array([part.info["recipe"]["num_candidates"] for part in parts])
    owners = np.searchsorted(np.cumsum([len(part) for part in parts]), ids, side="right")
    return [ids[widths[owners] == width] for width in np.unique(widths[owners])]
