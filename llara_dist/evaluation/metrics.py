"""Judging generated answers: the exact metric, the published one, ValidRatio and HitRatio@1 with intervals."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llara_dist.recommenders.bootstrap import bootstrap_interval

Protocol = Literal["exact", "published"]
PROTOCOLS: tuple[Protocol, ...] = ("exact", "published")


@dataclass(frozen=True)
class Judgement:
    """What one generated answer is worth.

    Fields:
        valid: it names one of the candidates.
        hit: it names the target; only a valid answer can.
    """

    valid: bool
    hit: bool


def normalise(text: str) -> str:
    """A title's comparable form: Unicode NFKC, case folded, runs of white space as one space, none at the ends."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def judge_exact(generated: str, target: str, candidates: Sequence[str]) -> Judgement:
    """The default metric: the whole answer, normalised, equals a candidate's normalised title.

    An empty title is never named. Titles that are equal after normalisation cannot be told apart by any answer, so
    naming one of them names each.
    """
    answer = normalise(generated)
    valid = bool(answer) and any(answer == normalise(candidate) for candidate in candidates)
    return Judgement(valid, valid and answer == normalise(target))


def judge_published(generated: str, target: str, candidates: Sequence[str]) -> Judgement:
    """The metric of LLaRA's published code: exactly one candidate, lower-cased and stripped, is a part of the answer.

    Kept to compare with published numbers alone. It calls a correct answer invalid where one title holds another
    ("Aliens" beside "Alien") or where a title is empty, and takes "Alien 3" for "Alien".
    """
    answer = generated.lower()
    named = [title for candidate in candidates if (title := candidate.strip().lower()) in answer]
    valid = len(named) == 1
    return Judgement(valid, valid and named[0] == target.strip().lower())


def judge(protocol: Protocol, generated: str, target: str, candidates: Sequence[str]) -> Judgement:
    """Judge one answer by a protocol's name."""
    return {"exact": judge_exact, "published": judge_published}[protocol](generated, target, candidates)


def proportion(values: np.ndarray) -> dict[str, Any]:
    """A share with its 95 % bootstrap interval and its rows; value and interval are None where there are no rows."""
    if not len(values):
        return {"value": None, "interval": None, "rows": 0}
    return {"value": float(values.mean()), "interval": list(bootstrap_interval(values)), "rows": len(values)}


def answer_metrics(valid: np.ndarray, hit: np.ndarray) -> dict[str, Any]:
    """ValidRatio and HitRatio@1 over both denominators.

    Args:
        valid: bool [n].
        hit: bool [n], true only where `valid` is.

    Returns:
        "valid_ratio", "hr@1" (hits / all rows: the paper's) and "hr@1_valid" (hits / valid rows: what the published
        code logs), each with value, interval and rows.
    """
    return {
        "valid_ratio": proportion(valid.astype(np.float64)),
        "hr@1": proportion(hit.astype(np.float64)),
        "hr@1_valid": proportion(hit[valid].astype(np.float64)),
    }
