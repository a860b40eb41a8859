"""Recipe files: the built-in ones load, and every mistake is named with its file and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from llara_dist.data.prepare import prepare
from llara_dist.data.recipes import Recipe, SyntheticSource, find_recipe, known_recipes, load_recipe
from llara_dist.errors import InputError


def test_built_in_recipes_load() -> None:
    assert {"movielens", "steam", "lastfm", "synthetic", "csv_example"} <= set(known_recipes())
    domains = {name: load_recipe(find_recipe(name)).domain for name in known_recipes()}
    assert domains["movielens"] == "movie"
    assert domains["steam"] == "game"
    assert domains["lastfm"] == "artist"


def test_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"recipe 'netflix': not one of the built-in csv_example, lastfm, movielens"):
        prepare("netflix", Path("out"))


GOOD = "name: x\ndomain: movie\nsource: {kind: llara}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\n", "field domain is missing"),
        (GOOD + "colour: red\n", "unknown field colour; known are name, domain"),
        (GOOD.replace("movie", "book"), "domain must be one of movie, game, artist, found 'book'"),
        (GOOD.replace("llara", "sql"), "source.kind must be one of movielens, llara, table, synthetic, found 'sql'"),
        (GOOD.replace("{kind: llara}", "llara"), "source.kind must be one of"),
        (GOOD.replace("{kind: llara}", "{kind: llara, x: 1}"), "unknown field source.x"),
        (GOOD.replace("{kind: llara}", "{kind: table, events: e.csv}"), "field source.items is missing"),
        (GOOD + "sequences: {min_history: three}\n", "sequences.min_history must be a whole number, found 'three'"),
        (GOOD + "sequences: {min_history: true}\n", "sequences.min_history must be a whole number, found True"),
        (GOOD + "sequences: {min_history: 11}\n", "sequences: min_history 11, max_history 10"),
        (GOOD + "sequences: {ratios: [0.5, 0.5]}\n", "sequences.ratios must be a list of 3"),
        (GOOD + "sequences: {ratios: [0.5, 0.4, x]}\n", "sequences.ratios must be a number, found 'x'"),
        (GOOD + "candidates: {count: 1}\n", "candidates: count 1"),
        (GOOD + "titles: {drop_year: 'yes'}\n", "titles.drop_year must be true or false"),
        (GOOD + "titles: [1]\n", "titles must be a mapping"),
        ("- a\n", "the file must be a mapping"),
        ("", "the file must be a mapping"),
        ("name: [\n", "line 2: not YAML"),
        ("name: !!python/object/apply:os.system ['true']\n", "not YAML"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.yaml: cannot be read"):
        prepare(str(tmp_path / "gone.yaml"), tmp_path / "out")


def test_defaults_are_recorded() -> None:
    recipe = Recipe(name="x", domain="movie", source=SyntheticSource(kind="synthetic", settings={"seed": 3}))
    assert recipe.as_json()["sequences"]["min_history"] == 3
    assert recipe.as_json()["source"] == {"kind": "synthetic", "settings": {"seed": 3}}


def test_raw_folder_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recipe movielens: needs --raw"):
        prepare("movielens", tmp_path / "out")
    with pytest.raises(InputError, match="no such folder"):
        prepare("movielens", tmp_path / "out", tmp_path / "raw")
    with pytest.raises(InputError, match="leave --raw out"):
        prepare("synthetic", tmp_path / "out", tmp_path)
    with pytest.raises(InputError, match=r"holds neither u\.data"):
        prepare("movielens", tmp_path / "out", tmp_path)
    (tmp_path / "u.data").touch()
    (tmp_path / "train_data.df").touch()
    with pytest.raises(InputError, match="holds both"):
        prepare("movielens", tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_settings_of_the_synthetic_world(tmp_path: Path) -> None:
    path = tmp_path / "world.yaml"
    text = "name: w\ndomain: game\nsource: {{kind: synthetic, settings: {{num_users: {}, {}}}}}\n"
    path.write_text(text.format(60, "num_items: 150"))
    result = prepare(str(path), tmp_path / "one")
    assert result["counts"]["users"] == 60
    assert result["counts"]["items"] == 150
    assert prepare(str(path), tmp_path / "two")["hash"] == result["hash"]
    path.write_text(text.format(60, "colour: red"))
    with pytest.raises(InputError, match=r"source\.settings: .*colour"):
        prepare(str(path), tmp_path / "three")
