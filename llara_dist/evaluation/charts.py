"""The report's charts as inline SVG that takes its colours from the page, so that light and dark both look right."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Drawn with these and replaced by CSS variables afterwards: matplotlib can only write fixed colours.
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_SERIES = tuple(f"#0{number}0{number}0f" for number in range(1, 7))
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--line"} | {
    colour: f"--series-{number}" for number, colour in enumerate(_SERIES)
}
_WIDTH_IN = 4.8


@dataclass(frozen=True)
class Bar:
    """One bar with its interval.

    Fields:
        label: at its left.
        value: a share, 0 … 1.
        interval: its bounds, or None where the value is exact.
        series: which of the page's colours.
        pale: drawn lighter, for a second reading of the same system.
    """

    label: str
    value: float
    interval: tuple[float, float] | None
    series: int
    pale: bool = False


@dataclass(frozen=True)
class Line:
    """One curve over optimizer steps; `raw` is drawn faintly behind its running mean.

    Fields:
        label: in the legend.
        steps: int [n].
        values: float [n].
        series: which of the page's colours.
        raw: whether the values are noisy: points behind a running mean; else they are drawn as they are.
    """

    label: str
    steps: np.ndarray
    values: np.ndarray
    series: int
    raw: bool = True


def bar_chart(bars: Sequence[Bar], description: str) -> str:
    """Horizontal bars from zero with intervals and values, SVG text.

    Args:
        bars: from top to bottom.
        description: for readers who cannot see it.
    """

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        highest = max([bar.interval[1] if bar.interval else bar.value for bar in bars] + [1e-9])
        for place, bar in enumerate(bars):
            axes.barh(place, bar.value, height=0.62, color=_SERIES[bar.series], alpha=0.5 if bar.pale else 1.0)
            end = bar.value
            if bar.interval is not None:
                low, high = bar.interval
                axes.plot([low, high], [place, place], color=_INK, linewidth=1.3, solid_capstyle="butt")
                axes.plot([low, low, high, high], [place] * 4, "|", color=_INK, markersize=6)
                end = high
            axes.text(end + 0.02 * highest, place, f"{100 * bar.value:.1f} %", va="center", color=_INK)
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * highest)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.grid(axis="x", color=_GRID, linewidth=0.8)
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        for side in ("top", "right", "bottom"):
            axes.spines[side].set_visible(False)

    return _svg(draw, 0.55 + 0.36 * len(bars), description)


def line_chart(lines: Sequence[Line], y_label: str, description: str, unit_range: bool = False) -> str:
    """Curves over optimizer steps, SVG text.

    Args:
        lines: at least one.
        y_label: what is drawn.
        description: for readers who cannot see it.
        unit_range: the y axis is 0 … 1.
    """

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for line in lines:
            colour = _SERIES[line.series]
            if line.raw:
                axes.plot(line.steps, line.values, ".", color=colour, alpha=0.4, markersize=3.5, markeredgewidth=0)
            smooth = running_mean(line.values) if line.raw else line.values
            axes.plot(line.steps, smooth, color=colour, linewidth=2, label=line.label)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(y_label)
        if unit_range:
            axes.set_ylim(-0.03, 1.03)
        axes.margins(x=0.01)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=2,
            frameon=False,
            labelcolor=_INK,
            handlelength=1.4,
            borderaxespad=0.2,
            columnspacing=1.2,
        )

    return _svg(draw, 3.0, description)


def running_mean(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Centred mean over `share` of the points (at least 5); at the ends over those that are there; float64 [n]."""
    half = max(2, int(share * len(values) / 2))
    summed = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    places = np.arange(len(values))
    start, stop = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (summed[stop] - summed[start]) / (stop - start)


def _svg(draw: Callable[[Any], None], height_in: float, description: str) -> str:
    """Run `draw` on a figure and return the SVG, its colours replaced by the page's variables."""
    from html import escape

    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        # Ids inside the SVGs of one page must differ between them and must not differ between runs.
        "svg.hashsalt": description,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _MUTED,
        "axes.edgecolor": _MUTED,
        "axes.axisbelow": True,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
        figure.patch.set_visible(False)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None
    opening = (
        f'<svg {view_box.group(0)} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{escape(description)}">'
    )
    text = opening + text[text.index(">") + 1 :]
    # A style element inside an inline SVG would be the whole page's; the page says the same for its charts alone.
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r"font(-family)?: ([0-9.]+px )?[^;\"]*sans-serif[^;\"]*", _plain_font, text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()


def _plain_font(match: re.Match[str]) -> str:
    """Keep a text's size and let the page choose the family."""
    size = match.group(2)
    return f"font-size: {size.strip()}; font-family: inherit" if size else "font-family: inherit"
