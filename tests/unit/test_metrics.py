import json
from pathlib import Path

import numpy as np
import pytest

from llara_dist.evaluation.metrics import Judgement, answer_metrics, judge, judge_exact, judge_published, normalise


def test_published_metric_reproduces_every_recorded_case(shared: Path) -> None:
    cases = json.loads((shared / "golden" / "published_metric.json").read_text())["cases"]
    assert len(cases) == 16
    for case in cases:
        judged = judge_published(case["generated"], case["target"], case["candidates"])
        assert judged == Judgement(case["published_valid"], case["published_hit"]), case["note"]


CANDIDATES = ["Toy Story", "Alien", "Aliens", "Heat", "Babe", "Babe: Pig in the City", "Amélie", ""]


@pytest.mark.parametrize(
    ("generated", "target", "valid", "hit"),
    [
        ("Heat", "Heat", True, True),
        ("  hEAT\n", "Heat", True, True),
        ("Toy  Story", "Toy Story", True, True),
        ("Aliens", "Aliens", True, True),
        ("Aliens", "Alien", True, False),
        ("Babe: Pig in the City", "Babe: Pig in the City", True, True),
        ("Ame\u0301lie", "Amélie", True, True),  # combining accent
        ("Ｈｅａｔ", "Heat", True, True),  # full-width letters
        ("Alien 3", "Alien", False, False),
        ("Heat.", "Heat", False, False),
        ("Heat, Alien", "Heat", False, False),
        ("", "Heat", False, False),
        ("   ", "", False, False),
        ("Casablanca", "Heat", False, False),
    ],
)
def test_exact_metric(generated: str, target: str, valid: bool, hit: bool) -> None:
    assert judge_exact(generated, target, CANDIDATES) == Judgement(valid, hit)
    assert judge("exact", generated, target, CANDIDATES) == Judgement(valid, hit)


def test_the_two_protocols_differ_where_titles_nest() -> None:
    assert judge("published", "Aliens", "Aliens", ["Alien", "Aliens"]) == Judgement(False, False)
    assert judge("exact", "Aliens", "Aliens", ["Alien", "Aliens"]) == Judgement(True, True)


def test_normalising_twice_changes_nothing() -> None:
    for text in ["ŒUVRE ﬁn", "  A\u00a0 b\t", "İstanbul", "ΐ", "ẞ"]:
        assert normalise(normalise(text)) == normalise(text)


def test_both_denominators_are_always_there() -> None:
    valid = np.array([True] * 8 + [False] * 2)
    hit = np.array([True] * 4 + [False] * 6)
    result = answer_metrics(valid, hit)
    assert result["valid_ratio"]["value"] == 0.8
    assert result["hr@1"] == {"value": 0.4, "interval": result["hr@1"]["interval"], "rows": 10}
    assert result["hr@1_valid"]["value"] == 0.5
    assert result["hr@1_valid"]["rows"] == 8
    low, high = result["hr@1"]["interval"]
    assert low < 0.4 < high


def test_no_valid_row_has_no_ratio_over_valid_rows() -> None:
    none = np.zeros(3, dtype=bool)
    result = answer_metrics(none, none)
    assert result["hr@1"]["value"] == 0.0
    assert result["hr@1_valid"] == {"value": None, "interval": None, "rows": 0}
