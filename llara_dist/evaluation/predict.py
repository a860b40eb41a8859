"""A tuned model over the rows of a split: answers generated, candidates scored, verdicts; any number of ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llara_dist import console, distributed
from llara_dist.data.predictions import Predictions
from llara_dist.evaluation.answers import answer_text, answer_tokens, check_answer
from llara_dist.evaluation.decode import MAX_NEW_TOKENS, generate
from llara_dist.evaluation.metrics import PROTOCOLS, judge
from llara_dist.evaluation.prompts import read_prompts
from llara_dist.evaluation.scoring import score_candidates
from llara_dist.model.hybrid import HybridLlama
from llara_dist.stream.reader import Samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RowResult:
    """What the model said of one row; fields that were not asked for are None."""

    key: int
    target: int
    candidates: np.ndarray
    generated: str | None
    finished: bool | None
    log_likelihoods: np.ndarray | None
    answer_tokens: np.ndarray | None


def predict(
    model: HybridLlama,
    shards: Samples,
    ids: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    titles: Sequence[str],
    *,
    hybrid: bool,
    generation: bool = True,
    ranking: bool = True,
    batch_size: int = 16,
    max_new_tokens: int = MAX_NEW_TOKENS,
    world: distributed.World | None = None,
) -> tuple[Predictions, dict[str, Any]]:
    """Run the model over rows, each rank over its share, and gather the whole on every rank.

    Args:
        model: in evaluation mode.
        shards: the split.
        ids: int [n], positions in the split's index.
        tokenizer: the model's.
        titles: by item id, as prompts show them.
        hybrid: which form of the rows.
        generation: whether to generate.
        ranking: whether to score the candidates.
        batch_size: rows at once.
        max_new_tokens: the longest answer.
        world: which share is this rank's; None = all of it.

    Returns:
        Predictions in the order of keys, and "prompts_s", "ranking_s", "generation_s" of the slowest rank.
    """
    world = world or distributed.World()
    answers = answer_tokens(tokenizer, titles)
    eos: Any = tokenizer.eos_token_id
    # Longest first: rows of a batch are of similar length, ranks get equal shares, too little memory shows at once.
    mine = ids[np.argsort(-shards.lookup(ids).tokens, kind="stable")][world.rank :: world.size]
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    results: list[RowResult] = []
    seconds = {"prompts_s": 0.0, "ranking_s": 0.0, "generation_s": 0.0}
    for batch in console.progress(batches, "evaluating") if world.is_main else batches:
        samples = shards.read(batch)
        for sample in samples:
            check_answer(sample, answers)
        shown = np.stack([sample.candidates for sample in samples]).astype(np.int32)
        started = time.perf_counter()
        prompts = read_prompts(model, samples, hybrid)
        read = time.perf_counter()
        scores = score_candidates(model, prompts, shown, answers) if ranking else None
        ranked = time.perf_counter()
        generated = generate(model, prompts, eos, max_new_tokens) if generation else None
        seconds["prompts_s"] += read - started
        seconds["ranking_s"] += ranked - read
        seconds["generation_s"] += time.perf_counter() - ranked
        results += [
            RowResult(
                key=sample.key,
                target=sample.target,
                candidates=shown[row],
                generated=None if generated is None else answer_text(tokenizer, generated[row].tokens),
                finished=None if generated is None else generated[row].finished,
                log_likelihoods=None if scores is None else scores.total[row],
                answer_tokens=None if scores is None else scores.tokens[row].astype(np.int32),
            )
            for row, sample in enumerate(samples)
        ]
    gathered = distributed.gather_objects((results, seconds))
    rows = sorted((row for part, _ in gathered for row in part), key=lambda row: row.key)
    slowest = {name: round(max(part[name] for _, part in gathered), 3) for name in seconds}
    return join_rows(rows, titles), slowest


def join_rows(rows: list[RowResult], titles: Sequence[str]) -> Predictions:
    """Rows as columns, answers judged by every protocol.

    Args:
        rows: in the order of keys, at least one, all with the same parts and number of candidates.
        titles: by item id, as prompts show them.
    """
    verdicts: dict[str, np.ndarray | None] = {f"{p}_{part}": None for p in PROTOCOLS for part in ("valid", "hit")}
    generated = None
    if rows[0].generated is not None:
        generated = [row.generated or "" for row in rows]
        for protocol in PROTOCOLS:
            judged = [
                judge(protocol, text, titles[row.target], [titles[int(item)] for item in row.candidates])
                for row, text in zip(rows, generated, strict=True)
            ]
            verdicts[f"{protocol}_valid"] = np.array([judgement.valid for judgement in judged])
            verdicts[f"{protocol}_hit"] = np.array([judgement.hit for judgement in judged])
    scores = [row.log_likelihoods for row in rows if row.log_likelihoods is not None]
    tokens = [row.answer_tokens for row in rows if row.answer_tokens is not None]
    return Predictions(
        keys=np.array([row.key for row in rows], dtype=np.uint64),
        targets=np.array([row.target for row in rows], dtype=np.int32),
        candidates=np.stack([row.candidates for row in rows]),
        generated=generated,
        finished=None if generated is None else np.array([bool(row.finished) for row in rows]),
        log_likelihoods=np.stack(scores) if scores else None,
        answer_tokens=np.stack(tokens) if tokens else None,
        **verdicts,
    )
