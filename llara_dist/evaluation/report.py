"""The one-page report: what came out, whatever it is. Every sentence is made from the numbers given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist.errors import InputError
from llara_dist.evaluation import page
from llara_dist.evaluation.arms import GENERATED, RANKED, Arm, compare, measure
from llara_dist.evaluation.charts import Bar, Line, bar_chart, line_chart
from llara_dist.integrity import write_file


@dataclass(frozen=True)
class Curve:
    """One training run, by logged step.

    Fields:
        name: of the arm.
        steps: int [n].
        loss: float [n], mean over the answer tokens.
        planned: float [n], p of the curriculum.
        realised: float [n], share of the step's samples that were hybrid.
    """

    name: str
    steps: np.ndarray
    loss: np.ndarray
    planned: np.ndarray
    realised: np.ndarray


def run_curve(name: str, run: Path) -> Curve:
    """A run's curves from its metrics.jsonl.

    Raises:
        InputError: the file is missing or holds no step.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: no readable log of a run ({error})") from None
    if not rows:
        raise InputError(f"{path}: holds no step")
    steps, loss, planned, realised = (
        np.array([row[field] for row in rows], dtype=np.float64) for field in ("step", "loss", "p", "hybrid_share")
    )
    return Curve(name, steps.astype(np.int64), loss, planned, realised)


def write_report(
    path: Path,
    *,
    title: str,
    lead: str,
    arms: Sequence[Arm],
    comparisons: Sequence[tuple[str, str]],
    curves: Sequence[Curve] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    seconds: Mapping[str, float] | None = None,
    environment: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the report as one HTML file that needs nothing else.

    Args:
        path: the file.
        title: of the page.
        lead: one or two sentences under it: what was run.
        arms: in the order shown; the same rows in each.
        comparisons: pairs of arms' names, first minus second; the first pair is the page's headline.
        curves: training runs; colours follow the arms of the same name.
        settings: sections of settings by title.
        seconds: time of each stage.
        environment: versions and hardware.
        notes: what a reader must know to judge the numbers.

    Returns:
        What the page says in numbers: "findings" (sentences), "arms", "comparisons".

    Raises:
        ValueError: arms of different rows, two of one name, or a comparison of an arm that is not there.
    """
    by_name = {arm.name: arm for arm in arms}
    if len(by_name) < len(arms):
        raise ValueError(f"arms of the same name: {', '.join(arm.name for arm in arms)}")
    for arm in arms:
        if not np.array_equal(arm.keys, arms[0].keys):
            raise ValueError(f"arm {arm.name!r} holds other rows than {arms[0].name!r}; they cannot be compared")
    unknown = [name for pair in comparisons for name in pair if name not in by_name]
    if unknown:
        raise ValueError(f"no arm is named {unknown[0]!r}; there are {', '.join(by_name)}")
    compared = [compare(by_name[first], by_name[second]) for first, second in comparisons]
    measured = {arm.name: measure(arm) for arm in arms}
    findings = [finding(result) for results in compared for result in results]
    headline = findings[: len(compared[0])] if compared else []
    series = {arm.name: number for number, arm in enumerate(arms)}
    parts = [
        page.card("What came out", *[page.paragraph(sentence) for sentence in headline], kind="findings"),
        page.grid(
            [
                _bars_card(arms, measured, series),
                _comparisons_card([result for results in compared for result in results]),
                *_curve_cards(curves, series),
            ]
        ),
        _arms_card(arms, measured),
    ]
    if notes:
        parts.append(page.card("How to read this", *[page.paragraph(note) for note in notes]))
    boxes = {name: {key: _plain(value) for key, value in values.items()} for name, values in (settings or {}).items()}
    if seconds:
        boxes["Time"] = {name: f"{value:.1f} s" for name, value in seconds.items()} | {
            "together": f"{sum(seconds.values()):.1f} s"
        }
    if environment:
        boxes["Environment"] = dict(environment)
    if boxes:
        inside = [page.Markup(f"<div><h2>{page.text(name)}</h2>{page.pairs(box)}</div>") for name, box in boxes.items()]
        parts.append(page.folded("Settings, time and environment", page.grid(inside)))
    write_file(Path(path), page.page(title, lead, *parts))
    return {
        "findings": findings,
        "arms": measured,
        "comparisons": [result for results in compared for result in results],
    }


def finding(result: Mapping[str, Any]) -> str:
    """One comparison as a sentence."""
    first, second = result["first"], result["second"]
    values, (low, high) = [_percent(value) for value in result["hr@1"]], result["interval"]
    ending = {
        "ahead": f"{first} is ahead, outside the interval",
        "behind": f"{first} is behind, outside the interval",
        "not told apart": "the interval holds zero, so these rows do not tell the two apart",
    }[result["verdict"]]
    rows = f"{result['rows']:,} test rows"
    if result["reading"] == result["against"]:
        doing, does = {
            GENERATED: ("Generating its answer freely", "names the target"),
            RANKED: ("Ranking the candidates", "puts the target first"),
        }[result["reading"]]
        start = f"{doing}, {first} {does} in {values[0]} of {rows}, {second} in {values[1]}"
    else:
        start = (
            f"Generating its answer freely, {first} names the target in {values[0]} of {rows}; "
            f"ranking the candidates, {second} puts it first in {values[1]}"
        )
    return (
        f"{start}: a difference of {_points(result['difference'])} points "
        f"(95 % paired interval {_points(low)} to {_points(high)}); {ending}."
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _plain(value: Any) -> str:
    return ", ".join(str(entry) for entry in value) if isinstance(value, list | tuple) else str(value)


def _bars_card(arms: Sequence[Arm], measured: Mapping[str, Any], series: Mapping[str, int]) -> str:
    bars = []
    for arm in arms:
        readings = [reading for reading in (GENERATED, RANKED) if reading in measured[arm.name]]
        for reading in readings:
            label = arm.name if len(readings) == 1 else f"{arm.name}, {reading}"
            numbers = measured[arm.name][reading]
            interval = tuple(numbers["interval"]) if numbers["interval"] else None
            bars.append(
                Bar(label, numbers["hr@1"], interval, series[arm.name], len(readings) > 1 and reading == RANKED)
            )
    description = "HR@1: " + ", ".join(f"{bar.label} {_percent(bar.value)}" for bar in bars)
    note = f"Share of {len(arms[0].keys):,} rows answered right, 95 % bootstrap intervals; the same candidates for all."
    return page.card("HR@1", bar_chart(bars, description), page.paragraph(note, "note"))


def _comparisons_card(results: Sequence[Mapping[str, Any]]) -> str:
    kinds = {"ahead": "good", "behind": "bad", "not told apart": "even"}
    rows = []
    for result in results:
        low, high = result["interval"]
        reading = (
            result["reading"]
            if result["reading"] == result["against"]
            else f"{result['reading']} / {result['against']}"
        )
        name = page.Markup(
            f"{page.text(result['first'])} − {page.text(result['second'])}<small>{page.text(reading)}</small>"
        )
        difference = page.Markup(f"{_points(result['difference'])}<small>{_points(low)} … {_points(high)}</small>")
        rows.append([name, difference, (result["verdict"], kinds[result["verdict"]])])
    note = (
        "Differences on the same rows with their 95 % paired bootstrap intervals; ahead or behind means that the "
        "interval leaves zero out."
    )
    columns = ["HR@1", "points", "verdict"]
    return page.card("Paired differences", page.table(columns, rows), page.paragraph(note, "note"))


def _curve_cards(curves: Sequence[Curve], series: Mapping[str, int]) -> list[str]:
    if not curves:
        return []
    cards = []
    spare = len(series)
    colours = {curve.name: series.get(curve.name, (spare + number) % 6) for number, curve in enumerate(curves)}
    losses = [Line(curve.name, curve.steps, curve.loss, colours[curve.name]) for curve in curves]
    last = ", ".join(f"{curve.name} {np.mean(curve.loss[-max(1, len(curve.loss) // 20) :]):.3f}" for curve in curves)
    cards.append(
        page.card(
            "Training loss",
            line_chart(losses, "cross-entropy, answer tokens", f"Training loss over steps; at the end {last}"),
            page.paragraph(f"Points: each step; lines: running mean. Mean of the last twentieth: {last}.", "note"),
        )
    )
    hybrid = [curve for curve in curves if curve.planned.max() > 0]
    if hybrid:
        lines = []
        for curve in hybrid:
            lines.append(Line(f"{curve.name}: planned p", curve.steps, curve.planned, 0, raw=False))
            lines.append(Line(f"{curve.name}: realised share", curve.steps, curve.realised, colours[curve.name]))
        gap = max(float(abs(curve.planned.mean() - curve.realised.mean())) for curve in hybrid)
        without = [curve.name for curve in curves if curve.planned.max() == 0]
        rest = f" {', '.join(without)}: p = 0 throughout." if without else ""
        cards.append(
            page.card(
                "Curriculum",
                line_chart(
                    lines, "share of hybrid samples", "Planned p and realised share over steps", unit_range=True
                ),
                page.paragraph(f"Planned and realised mean differ by {100 * gap:.1f} points.{rest}", "note"),
            )
        )
    return cards


def _arms_card(arms: Sequence[Arm], measured: Mapping[str, Any]) -> str:
    def rate(numbers: Mapping[str, Any] | None) -> object:
        if numbers is None:
            return "–"
        interval = numbers["interval"]
        bounds = f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}" if interval else "exact"
        return page.Markup(f"{_percent(numbers['hr@1'])}<small>{bounds}</small>")

    def share(value: float | None) -> str:
        return "–" if value is None else _percent(value)

    rows = []
    for arm in arms:
        numbers = measured[arm.name]
        ndcg = f"{numbers['ndcg@5']:.3f}" if "ndcg@5" in numbers else "–"
        rows.append(
            [
                page.Markup(f"{page.text(arm.name)}<small>{page.text(arm.about)}</small>"),
                rate(numbers.get(GENERATED)),
                share(numbers.get("valid_ratio")),
                share(numbers.get("hr@1_valid")),
                rate(numbers.get(RANKED)),
                ndcg,
            ]
        )
    columns = ["system", "HR@1 generated", "valid answers", "HR@1 of valid", "HR@1 ranked", "NDCG@5 ranked"]
    note = (
        "Generated: greedy decoding, the normalised answer must be the target's title; HR@1 counts invalid answers as "
        "misses, “of valid” leaves them out. Ranked: the candidates sorted by score or log-likelihood."
    )
    return page.card("All numbers", page.table(columns, rows), page.paragraph(note, "note"))
