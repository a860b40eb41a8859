import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from llara_dist.errors import InputError
from llara_dist.evaluation.arms import (
    GENERATED,
    RANKED,
    Arm,
    compare,
    evaluated_arm,
    measure,
    random_arm,
    recommender_arm,
    verdict,
)
from llara_dist.evaluation.charts import Bar, Line, bar_chart, line_chart, running_mean
from llara_dist.evaluation.report import Curve, finding, run_curve, write_report
from llara_dist.recommenders.evaluation import evaluate as evaluate_recommender
from llara_dist.recommenders.ranking import Ranks
from llara_dist.recommenders.training import train as train_recommender
from tests.unit.worlds import write_world

ROWS = 400
KEYS = np.arange(100, 100 + ROWS, dtype=np.uint64)


def arm(name: str, generated: float, ranked: float, valid: float = 0.95) -> Arm:
    """An arm with exactly the given shares, the same rows easy for every arm."""
    order = np.arange(ROWS) / ROWS
    above = np.where(order < ranked, 0, 5)
    return Arm(name, f"about {name}", KEYS, Ranks(above, np.zeros(ROWS, np.int64)), order < valid, order < generated)


def curve(name: str, planned: np.ndarray) -> Curve:
    steps = np.arange(len(planned))
    noise = np.random.default_rng(0).normal(0, 0.05, len(planned))
    return Curve(name, steps, 3 - steps / len(steps) + noise, planned, np.clip(planned + noise, 0, 1))


class Reader(HTMLParser):
    """Collects text and what the page would load, and checks that tags close."""

    VOID = frozenset({"meta", "br", "use", "path", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "title"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def arms() -> list[Arm]:
    return [random_arm(KEYS, 20), arm("text-only", 0.25, 0.30), arm("hybrid", 0.35, 0.30)]


def write(path: Path, arms: list[Arm], **more) -> dict:
    return write_report(
        path,
        title="A <title>",
        lead="what & how",
        arms=arms,
        comparisons=[("hybrid", "text-only"), ("hybrid", "random")],
        **more,
    )


def test_the_page_needs_nothing_else_and_is_well_formed(arms: list[Arm], tmp_path: Path) -> None:
    steps = np.linspace(0, 1, 60)
    write(
        tmp_path / "report.html",
        arms,
        curves=[curve("text-only", 0 * steps), curve("hybrid", steps)],
        settings={"Training": {"steps": 60, "targets": ["q", "k"]}},
        seconds={"prepare": 1.5, "train": 2.5},
        environment={"torch": "<2.13>"},
        notes=["a note & more"],
    )
    html = (tmp_path / "report.html").read_text()
    page = Reader(html)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(load.startswith("#") for load in page.loads)
    assert "url(" not in re.sub(r"url\(#", "", html)
    assert "@import" not in html
    assert page.tags.count("svg") == 3
    for words in ("A <title>", "what & how", "<2.13>", "a note & more", "together 4.0 s", "targets q, k"):
        assert words in page.text, words
    for name in ("random", "text-only", "hybrid"):
        assert f"about {name}" in page.text or name == "random"
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_the_page_says_what_came_out_and_not_what_was_hoped(arms: list[Arm], tmp_path: Path) -> None:
    said = write(tmp_path / "ahead.html", arms)
    assert [result["verdict"] for result in said["comparisons"]] == ["ahead", "not told apart", "ahead", "ahead"]
    text = Reader((tmp_path / "ahead.html").read_text()).text
    assert "hybrid names the target in 35.0 % of 400 test rows, text-only in 25.0 %" in text
    assert "hybrid is ahead, outside the interval" in text
    assert "do not tell the two apart" in text
    said = write(tmp_path / "behind.html", [arms[0], arm("text-only", 0.5, 0.5), arm("hybrid", 0.3, 0.2)])
    assert said["comparisons"][0]["verdict"] == "behind"
    text = Reader((tmp_path / "behind.html").read_text()).text
    assert "hybrid is behind, outside the interval" in text
    assert "a difference of −20.0 points" in text
    assert "is ahead" not in text.split("HR@1")[0]


def test_numbers_in_the_page_are_those_returned(arms: list[Arm], tmp_path: Path) -> None:
    said = write(tmp_path / "report.html", arms)
    text = Reader((tmp_path / "report.html").read_text()).text
    for sentence in said["findings"][:2]:
        assert sentence in text
    for numbers in said["arms"].values():
        for reading in (GENERATED, RANKED):
            if reading in numbers:
                assert f"{100 * numbers[reading]['hr@1']:.1f} %" in text
    assert said["arms"]["random"][RANKED] == {"hr@1": pytest.approx(0.05), "interval": None}
    assert said["arms"]["hybrid"]["valid_ratio"] == 0.95
    assert said["arms"]["hybrid"]["hr@1_valid"] == pytest.approx(0.35 / 0.95, abs=0.003)
    json.dumps(said)


def test_the_same_numbers_give_the_same_bytes(arms: list[Arm], tmp_path: Path) -> None:
    curves = [curve("hybrid", np.linspace(0, 1, 40))]
    write(tmp_path / "a.html", arms, curves=curves)
    write(tmp_path / "b.html", arms, curves=curves)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_arms_of_other_rows_are_not_compared(arms: list[Arm], tmp_path: Path) -> None:
    other = Arm("other", "", KEYS[::-1], arms[1].ranks)
    with pytest.raises(ValueError, match="'other' holds other rows"):
        write(tmp_path / "report.html", [*arms, other])
    with pytest.raises(ValueError, match="no arm is named 'hybrid'"):
        write(tmp_path / "report.html", arms[:2])
    assert not (tmp_path / "report.html").exists()


def test_a_paired_comparison_uses_the_rows_and_not_the_shares(arms: list[Arm]) -> None:
    shuffled = np.random.default_rng(0).permutation(ROWS)
    hybrid = arms[2]
    assert hybrid.hit is not None
    unrelated = Arm("hybrid", "", KEYS, hit=hybrid.hit[shuffled], valid=np.ones(ROWS, bool))
    paired, unpaired = compare(hybrid, arms[1])[0], compare(unrelated, arms[1])[0]
    assert paired["difference"] == pytest.approx(unpaired["difference"])
    widths = [high - low for low, high in (paired["interval"], unpaired["interval"])]
    assert widths[0] < 0.6 * widths[1]


def test_a_system_that_only_ranks_is_compared_by_its_ranking() -> None:
    ranks_only = Arm("SASRec", "", KEYS, arm("x", 0.0, 0.4).ranks)
    results = compare(arm("hybrid", 0.3, 0.35), ranks_only)
    assert [(result["reading"], result["against"]) for result in results] == [(GENERATED, RANKED), (RANKED, RANKED)]
    assert "ranking the candidates, SASRec puts it first in 40.0 %" in finding(results[0])
    assert measure(ranks_only).keys() == {"rows", RANKED, "ndcg@5"}


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.01, 0.2, "ahead"), (-0.2, -0.01, "behind"), (-0.1, 0.1, "not told apart"), (0.0, 0.1, "not told apart")],
)
def test_verdict(low: float, high: float, said: str) -> None:
    assert verdict(low, high) == said


def test_no_valid_answer_at_all_is_reported_as_such(tmp_path: Path) -> None:
    silent = Arm("hybrid", "", KEYS, None, np.zeros(ROWS, bool), np.zeros(ROWS, bool))
    said = write(tmp_path / "report.html", [random_arm(KEYS, 20), arm("text-only", 0.2, 0.2), silent])
    assert said["arms"]["hybrid"]["hr@1_valid"] is None
    assert said["comparisons"][0]["verdict"] == "behind"


def test_charts_take_their_colours_from_the_page_and_are_valid_xml() -> None:
    from xml.etree import ElementTree

    bars = bar_chart([Bar("a <b>", 0.3, (0.2, 0.4), 1), Bar("zero", 0.0, None, 0, pale=True)], "two & more")
    lines = line_chart([Line("x", np.arange(30), np.random.default_rng(0).random(30), 2)], "y", "one")
    for svg in (bars, lines):
        ElementTree.fromstring(svg)
        assert not re.search(r"#[0-9a-f]{6}", svg)
        assert "var(--" in svg
    assert "30.0 %" in bars
    assert 'aria-label="two &amp; more"' in bars


def test_running_mean_keeps_a_constant_and_lowers_noise() -> None:
    assert running_mean(np.full(50, 2.0)) == pytest.approx(2.0)
    noise = np.random.default_rng(0).normal(size=400)
    assert running_mean(noise).std() < 0.4 * noise.std()
    assert len(running_mean(np.array([1.0]))) == 1


def test_a_recommenders_arm_holds_what_its_evaluation_says(tmp_path: Path) -> None:
    write_world(tmp_path / "data")
    train_recommender(tmp_path / "data", tmp_path / "rec", epochs=1, dim=16, heads=2)
    made = recommender_arm("SASRec", "", tmp_path / "data", tmp_path / "rec")
    scores = evaluate_recommender(tmp_path / "data", tmp_path / "rec", "test")
    assert measure(made)[RANKED]["hr@1"] == scores["candidates"]["hr@1"]
    assert measure(made)[RANKED]["interval"] == scores["candidates"]["hr@1_interval"]


def test_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"predictions\.parquet: not found"):
        evaluated_arm("hybrid", "", tmp_path)
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        run_curve("hybrid", tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no step"):
        run_curve("hybrid", tmp_path)
    row = {"step": 0, "loss": 1.5, "p": 0.25, "hybrid_share": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert run_curve("hybrid", tmp_path).realised.tolist() == [0.5]
