"""One self-contained HTML page: no script, no request, light and dark, from a phone to a desktop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_CSS = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1b1f24; --muted: #59636e; --line: #e1e4e8;
  --series-0: #8a929b; --series-1: #1a7f5a; --series-2: #b3600b; --series-3: #2f6fd0; --series-4: #8250c4;
  --series-5: #b4326b; --good: #1a7f5a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1c2127; --ink: #e8eaed; --muted: #9aa4af;
  --line: #333b44; --series-0: #8d969f; --series-1: #3fb68b; --series-2: #e59a45; --series-3: #6ba3f5;
  --series-4: #b492ee; --series-5: #ea7fae; --good: #3fb68b; --bad: #f2837b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 16px 56px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.08rem; margin: 0 0 8px; }
p { margin: 0 0 10px; max-width: 75ch; }
.lead { color: var(--muted); margin-bottom: 20px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; margin: 0 0 16px;
  min-width: 0; }
.findings { border-left: 4px solid var(--series-3); }
.findings p:last-child, .card > p:last-child { margin-bottom: 0; }
.findings p:first-of-type { font-size: 1.1rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
.grid .card { margin: 0; }
.grid + .card, .card + .grid, .grid + .grid { margin-top: 16px; }
.note { color: var(--muted); font-size: .9rem; }
svg { display: block; width: 100%; height: auto; max-width: 560px; margin: 0 auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { white-space: normal; font-weight: 600; color: var(--muted); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 8.5em; }
th:last-child, td:last-child { padding-right: 0; }
tr:last-child td { border-bottom: 0; }
td small { color: var(--muted); display: block; }
td.good { color: var(--good); font-weight: 600; } td.bad { color: var(--bad); font-weight: 600; }
.pairs td { white-space: normal; overflow-wrap: anywhere; } .pairs td:first-child { color: var(--muted); width: 45%; }
details summary { cursor: pointer; font-weight: 600; } details .grid { margin-top: 12px; }
details h2 { font-size: .95rem; }
@media (max-width: 520px) { main { padding: 20px 10px 40px; } .card { padding: 13px; } th, td { padding: 6px 7px; }
  h1 { font-size: 1.35rem; }
  th:first-child, td:first-child { min-width: 7.5em; } td.good, td.bad, td.even { white-space: normal; } }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""


class Markup(str):
    """Text that is HTML already; every other text is escaped where it is put in."""

    __slots__ = ()


def text(value: object) -> str:
    """A value as HTML: Markup as it is, anything else escaped."""
    return value if isinstance(value, Markup) else escape(str(value))


def card(title: str, *parts: str, kind: str = "") -> Markup:
    """A titled box; parts are HTML."""
    return Markup(f'<section class="card {kind}"><h2>{text(title)}</h2>{"".join(parts)}</section>')


def paragraph(content: str, kind: str = "") -> Markup:
    """A paragraph of plain text or Markup."""
    return Markup(f'<p class="{kind}">{text(content)}</p>' if kind else f"<p>{text(content)}</p>")


def grid(cards: Iterable[str]) -> Markup:
    """Boxes beside each other where there is room."""
    return Markup(f'<div class="grid">{"".join(cards)}</div>')


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """A table; cells are plain text, Markup, or (text, class) pairs."""

    def cell(value: object) -> str:
        if isinstance(value, tuple):
            return f'<td class="{value[1]}">{text(value[0])}</td>'
        return f"<td>{text(value)}</td>"

    head = "".join(f"<th>{text(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return Markup(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def pairs(values: Mapping[str, Any]) -> Markup:
    """A table of names and values."""
    body = "".join(f"<tr><td>{text(name)}</td><td>{text(value)}</td></tr>" for name, value in values.items())
    return Markup(f'<table class="pairs"><tbody>{body}</tbody></table>')


def folded(title: str, *parts: str) -> Markup:
    """A box that opens on a click."""
    return Markup(f'<details class="card"><summary>{text(title)}</summary>{"".join(parts)}</details>')


def page(title: str, lead: str, *parts: str) -> str:
    """The whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_CSS}</style></head>\n"
        f'<body><main><h1>{text(title)}</h1><p class="lead">{text(lead)}</p>\n'
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )
