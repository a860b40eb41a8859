"""Titles: years, articles, repairs, and that no two are alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llara_dist.data.titles import TitleRules, clean_titles, move_articles, repair_text, split_year, title_key

FILM = TitleRules(drop_year=True, move_articles=True)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Toy Story (1995)", "Toy Story"),
        ("Matrix, The (1999)", "The Matrix"),
        ("American in Paris, An (1951)", "An American in Paris"),
        ("Fish Called Wanda, A (1988)", "A Fish Called Wanda"),
        ("Misérables, Les (1995)", "Les Misérables"),
        ("Enfer, L' (1994)", "L'Enfer"),
        ("Boot, Das (1981)", "Das Boot"),
        ("Bewegte Mann, Der (1994)", "Der Bewegte Mann"),
        ("Postino, Il (1994)", "Il Postino"),
        ("Promesse, La (1996)", "La Promesse"),
        ("Tin Drum, The (Blechtrommel, Die) (1979)", "The Tin Drum (Die Blechtrommel)"),
        ("Star Maker, The (Uomo delle stelle, L') (1995)", "The Star Maker (L'Uomo delle stelle)"),
        ("Seventh Seal, The (Sjunde inseglet, Det) (1957)", "The Seventh Seal (Det Sjunde inseglet)"),
        ("Shanghai Triad (Yao a yao yao dao waipo qiao) (1995)", "Shanghai Triad (Yao a yao yao dao waipo qiao)"),
        ("Fille seule, La (A Single Girl) (1995)", "La Fille seule (A Single Girl)"),
        (
            "Vitelloni, I (a.k.a. Young and the Passionate, The) (1953)",
            "I Vitelloni (a.k.a. The Young and the Passionate)",
        ),
        ("Good, The Bad and The Ugly, The (1966)", "The Good, The Bad and The Ugly"),
        ("Lost World: Jurassic Park, The (1997)", "The Lost World: Jurassic Park"),
        (
            "Land Before Time III: The Time of the Great Giving (1995) (V)",
            "Land Before Time III: The Time of the Great Giving",
        ),
        ("Two Friends (1986) ", "Two Friends"),
        ("Cry, the Beloved Country (1995)", "Cry, the Beloved Country"),
        ("I, Worst of All (Yo, la peor de todas) (1990)", "I, Worst of All (Yo, la peor de todas)"),
        ("Corrina, Corrina (1994)", "Corrina, Corrina"),
        ("20,000 Leagues Under the Sea (1954)", "20,000 Leagues Under the Sea"),
        ("2001: A Space Odyssey (1968)", "2001: A Space Odyssey"),
        ("1984", "1984"),
        ("(1999)", "Unknown movie 0"),
        ("unknown", "Unknown movie 0"),
        ("Unknown (2011)", "Unknown"),
    ],
)
def test_film_titles(raw: str, clean: str) -> None:
    assert clean_titles([raw], FILM, "movie")[0] == [clean]


@given(st.text(max_size=20))
def test_key_is_what_the_exact_metric_compares(title: str) -> None:
    from llara_dist.evaluation.metrics import normalise

    assert title_key(title) == normalise(title)


def test_without_rules_only_repairs() -> None:
    titles, report = clean_titles(["Crow, The (1994)", "R&amp;B  Stars\t&#39;99 "], TitleRules(), "artist")
    assert titles == ["Crow, The (1994)", "R&B Stars '99"]
    assert report.years_dropped == report.articles_moved == report.collisions == 0


def test_repairs() -> None:
    assert repair_text("Cafe\u0301 \u200bau\u00a0Lait\x00\n") == "Café au Lait"
    assert split_year("Heat (1995)") == ("Heat", "1995")
    assert split_year("Room 1408") == ("Room 1408", None)
    assert move_articles("To Have, or Not") == "To Have, or Not"


def test_collisions_get_years_then_numbers() -> None:
    raw = ["Sabrina (1995)", "Sabrina (1954)", "Money Talks (1997)", "money talks (1997)", "That (1997)", "That (1997)"]
    raw += ["That (1965)", "Money Talks (2) (1990)"]
    titles, report = clean_titles(raw, FILM, "movie")
    assert titles[:2] == ["Sabrina (1995)", "Sabrina (1954)"]
    assert titles[2:4] == ["Money Talks", "money talks (3)"]  # (2) is the name of another film
    assert titles[4:7] == ["That (1997)", "That (1997) (2)", "That (1965)"]
    assert (report.collisions, report.colliding_groups) == (7, 3)
    assert (report.told_apart_by_year, report.told_apart_by_number) == (5, 2)


def test_empty_titles_are_named_and_counted() -> None:
    titles, report = clean_titles(["", "  ", "N/A", "Unknown game b"], TitleRules(), "game", ["a", "b", "c", "d"])
    assert titles == ["Unknown game a", "Unknown game b", "Unknown game c", "Unknown game b (2)"]
    assert report.empty_or_unknown == 3


@given(st.lists(st.text(alphabet="aA (),The12\u200b\u0301ß", max_size=12), min_size=1, max_size=30))
def test_result_is_unique_and_not_empty(raw: list[str]) -> None:
    for rules in (FILM, TitleRules()):
        titles, _ = clean_titles(raw, rules, "movie")
        assert len({title_key(title) for title in titles}) == len(raw)
        assert all(title.strip() == title and title for title in titles)
