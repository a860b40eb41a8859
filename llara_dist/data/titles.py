"""Titles as a language model should read them: cleaned, never empty, no two alike.

A title is what the model has to answer with, so two items with one title could not be told apart, and a metric
that compares normalised text would count one as the other.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

_YEAR = re.compile(r"\s*\((\d{4})(?:[-–](?:\d{4})?)?\)(?:\s*\((?:V|TV|VG)\))?\s*$")
_PLACEHOLDERS = {"", "unknown", "n/a", "nan"}
# The articles that catalogues sort behind a comma, by language; "I" (Italian) and "A" (Portuguese) included.
_ARTICLES = (
    "The A An",  # English
    "Le La Les L' Un Une",  # French
    "Il Lo I Gli Uno Una",  # Italian, with La, Le, L', Un from above
    "El Los Las",  # Spanish, with La, Un, Una
    "Der Die Das Ein Eine",  # German
    "De Het Een Den Det",  # Dutch, Scandinavian
    "O Os As Um Uma",  # Portuguese, with A
)
_ARTICLE = "|".join(sorted({word for line in _ARTICLES for word in line.split()}, key=lambda word: (-len(word), word)))
# "(start or bracket)  [a.k.a. ]Body, Article  (end or bracket)"; an article in small letters is part of a sentence.
_MOVED = re.compile(
    rf"(?P<lead>\s*(?:a\.?k\.?a\.?\s+)?)(?P<body>[^()]+?)\s*,\s*(?P<article>{_ARTICLE})(?=\s*(?:[()]|$))"
)


@dataclass(frozen=True)
class TitleRules:
    """What is done to raw titles besides repairing entities, spaces and control characters."""

    drop_year: bool = False
    """Drop a year in brackets at the end: "Heat (1995)" → "Heat"."""
    move_articles: bool = False
    """Put a sorted article back: "Matrix, The" → "The Matrix", also inside brackets."""


@dataclass(frozen=True)
class TitleReport:
    """What cleaning found, for dataset.json and the audit."""

    years_dropped: int
    articles_moved: int
    empty_or_unknown: int
    """Titles without content, now "Unknown <domain> <id>"."""
    collisions: int
    """Titles that equalled another one (in any case) after cleaning, each member counted."""
    colliding_groups: int
    """How many different titles those share."""
    told_apart_by_year: int
    told_apart_by_number: int
    examples: list[str] = field(default_factory=list)
    """A few of the titles told apart."""

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return dict(vars(self))


def title_key(title: str) -> str:
    """What two titles must not share: compatibility form, no case, single spaces."""
    folded = unicodedata.normalize("NFKC", title).casefold()  # folding may leave the compatibility form again
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def repair_text(raw: str) -> str:
    """Resolve HTML entities, compose accents, drop control and zero-width characters, squeeze white space."""
    text = unicodedata.normalize("NFC", html.unescape(raw))
    text = "".join(" " if char.isspace() else char for char in text)
    text = "".join(char for char in text if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    return " ".join(text.split())


def split_year(title: str) -> tuple[str, str | None]:
    """Take a year in brackets off the end: "Heat (1995)" → ("Heat", "1995"); (title, None) where there is none."""
    match = _YEAR.search(title)
    return (title[: match.start()].rstrip(), match.group(1)) if match else (title, None)


def move_articles(title: str) -> str:
    """Put sorted articles back: "Tin Drum, The (Blechtrommel, Die)" → "The Tin Drum (Die Blechtrommel)"."""

    def moved(match: re.Match[str]) -> str:
        article = match["article"]
        return f"{match['lead']}{article}{'' if article.endswith(chr(39)) else ' '}{match['body']}"

    return _MOVED.sub(moved, title)


def clean_titles(
    raw: list[str], rules: TitleRules, domain: str, item_ids: list[str] | None = None
) -> tuple[list[str], TitleReport]:
    """Clean titles and tell apart those that are equal.

    Titles that collide get their years back where these differ ("Sabrina (1954)", "Sabrina (1995)"); whatever still
    collides is numbered in id order from the second one on ("Money Talks", "Money Talks (2)").

    Args:
        raw: titles by item id.
        rules: the recipe's rules.
        domain: names an item without a title, "Unknown movie 267".
        item_ids: raw ids for those names; positions where absent.

    Returns:
        Titles by item id, unique under `title_key` and not empty, and the report.
    """
    item_ids = item_ids or [str(item) for item in range(len(raw))]
    titles: list[str] = []
    years: list[str | None] = []
    moved = unknown = 0
    for item_id, text in zip(item_ids, raw, strict=True):
        repaired = repair_text(text)
        title, year = split_year(repaired)
        if not rules.drop_year:
            title = repaired
        if rules.move_articles:
            before, title = title, move_articles(title)
            moved += before != title
        # A film may be called "Unknown (2011)": only one without a year is taken for a missing title.
        if not title or (year is None and title.casefold() in _PLACEHOLDERS):
            title = f"Unknown {domain} {item_id}"
            unknown += 1
        titles.append(title)
        years.append(year)
    keys = [title_key(title) for title in titles]
    sizes = Counter(keys)
    by_year, by_number, examples = _tell_apart(titles, years, keys, sizes, rules.drop_year)
    return titles, TitleReport(
        years_dropped=sum(year is not None for year in years) if rules.drop_year else 0,
        articles_moved=moved,
        empty_or_unknown=unknown,
        collisions=sum(size for size in sizes.values() if size > 1),
        colliding_groups=sum(size > 1 for size in sizes.values()),
        told_apart_by_year=by_year,
        told_apart_by_number=by_number,
        examples=examples,
    )


def _tell_apart(
    titles: list[str], years: list[str | None], keys: list[str], sizes: Counter[str], use_years: bool
) -> tuple[int, int, list[str]]:
    """Change `titles` in place until no two keys are equal; (by year, by number, examples)."""
    groups: dict[str, list[int]] = defaultdict(list)
    for item, key in enumerate(keys):
        if sizes[key] > 1:
            groups[key].append(item)
    by_year = by_number = 0
    changed: list[int] = []
    for members in groups.values():
        group_years = [years[item] for item in members]
        if use_years and None not in group_years and len(set(group_years)) > 1:
            for item in members:
                titles[item] = f"{titles[item]} ({years[item]})"
            by_year += len(members)
            changed += members
    final = [title_key(title) for title in titles]
    taken = set(final)
    seen: set[str] = set()
    for item, key in enumerate(final):
        if key not in seen:
            seen.add(key)
            continue
        number = 2
        while title_key(f"{titles[item]} ({number})") in taken:
            number += 1
        titles[item] = f"{titles[item]} ({number})"
        taken.add(title_key(titles[item]))
        seen.add(title_key(titles[item]))
        by_number += 1
        changed.append(item)
    return by_year, by_number, [titles[item] for item in sorted(set(changed))[:6]]
