"""Recipes: how one data set becomes a dataset folder, a short YAML file read into frozen dataclasses.

Built-in recipes lie in the checkout's `shards/recipes/`; any other YAML file is given by its path.
"""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from llara_dist.data.filters import FilterRules
from llara_dist.data.sequences import SequenceRules
from llara_dist.data.tables import TableSource
from llara_dist.data.titles import TitleRules
from llara_dist.data.wording import DOMAINS
from llara_dist.errors import InputError

RECIPES = Path(__file__).parents[2] / "shards" / "recipes"


@dataclass(frozen=True)
class MovieLensSource:
    """MovieLens-100K: the publisher's folder (u.data, u.item), or LLaRA's (train_data.df …), whichever --raw holds."""

    kind: Literal["movielens"]
    min_rating: float = 3
    """Publisher's folder: lowest rating that counts as an interaction."""
    drop_first_line: bool = True
    """Publisher's folder: leave out the first event, as LLaRA's published split does."""


@dataclass(frozen=True)
class LlaraSource:
    """One of LLaRA's own folders: train_data.df, Val_data.df, Test_data.df, and id2name.txt or u.item."""

    kind: Literal["llara"]


@dataclass(frozen=True)
class SyntheticSource:
    """The built-in synthetic world; takes no --raw."""

    kind: Literal["synthetic"]
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of `llara_dist.data.synthetic.synthetic_world`: seed, num_users, num_items, …"""


Source = MovieLensSource | LlaraSource | TableSource | SyntheticSource
_SOURCES: dict[str, type] = {
    "movielens": MovieLensSource,
    "llara": LlaraSource,
    "table": TableSource,
    "synthetic": SyntheticSource,
}


@dataclass(frozen=True)
class CandidateRules:
    """The frozen candidates of validation and test."""

    count: int = 20
    """Shown per row, the target included."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 2:
            raise InputError(f"count {self.count}: must be at least 2, the target and one negative")


@dataclass(frozen=True)
class Recipe:
    """A recipe file."""

    name: str
    """The data set's name, kept in dataset.json."""
    domain: Literal["movie", "game", "artist"]
    """Which prompt templates fit."""
    source: Source
    titles: TitleRules = field(default_factory=TitleRules)
    filters: FilterRules = field(default_factory=FilterRules)
    sequences: SequenceRules = field(default_factory=SequenceRules)
    candidates: CandidateRules = field(default_factory=CandidateRules)

    def as_json(self) -> dict[str, Any]:
        """The recipe with its defaults filled in, as a JSON object."""
        return dataclasses.asdict(self)


def known_recipes() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(recipe: str) -> Path:
    """The file of a built-in recipe's name or of a path that ends in .yaml or .yml.

    Raises:
        InputError: there is no such recipe or file.
    """
    if recipe.endswith((".yaml", ".yml")):
        return Path(recipe)
    if recipe not in known_recipes():
        raise InputError(
            f"recipe {recipe!r}: not one of the built-in {', '.join(known_recipes()) or '(none found)'}; "
            "for your own give the path of a .yaml file"
        )
    return RECIPES / f"{recipe}.yaml"


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        InputError: the file is missing, no YAML mapping, or has an unknown, missing or wrong field.
    """
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a recipe file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise InputError(f"{path}: {place}not YAML ({problem})") from None
    return _build(Recipe, value, str(path), "")


def _build(cls: type, value: Any, file: str, where: str) -> Any:
    """A dataclass from a mapping; every problem is named with its file and dotted field."""
    if not isinstance(value, dict):
        raise InputError(f"{file}: {where or 'the file'} must be a mapping of fields, found {_show(value)}")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    for key in value:
        if key not in fields:
            raise InputError(f"{file}: unknown field {_join(where, str(key))}; known are {', '.join(fields)}")
    given: dict[str, Any] = {}
    for name, item in fields.items():
        if name in value:
            given[name] = _convert(hints[name], value[name], file, _join(where, name))
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise InputError(f"{file}: field {_join(where, name)} is missing")
    try:
        return cls(**given)
    except InputError as error:
        message = f"{where}: {error}" if where else str(error)
        raise InputError(f"{file}: {message}") from None


def _convert(kind: Any, value: Any, file: str, where: str) -> Any:
    origin = get_origin(kind)
    if kind == Source:
        name = value.get("kind") if isinstance(value, dict) else None
        if name not in _SOURCES:
            raise InputError(f"{file}: {where}.kind must be one of {', '.join(_SOURCES)}, found {_show(name)}")
        return _build(_SOURCES[name], value, file, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build(kind, value, file, where)
    if origin is Literal:
        if value not in get_args(kind):
            raise InputError(
                f"{file}: {where} must be one of {', '.join(map(str, get_args(kind)))}, found {_show(value)}"
            )
        return value
    if origin in (Union, types.UnionType):  # only "something or null" is used
        return None if value is None else _convert(get_args(kind)[0], value, file, where)
    if origin is tuple:
        kinds = get_args(kind)
        if not isinstance(value, list) or len(value) != len(kinds):
            raise InputError(f"{file}: {where} must be a list of {len(kinds)}, found {_show(value)}")
        return tuple(_convert(inner, entry, file, where) for inner, entry in zip(kinds, value, strict=True))
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise InputError(f"{file}: {where} must be a mapping, found {_show(value)}")
        return value
    accepted: Any = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{file}: {where} must be {_KIND_NAMES[kind]}, found {_show(value)}")
    return float(value) if kind is float else value


_KIND_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _show(value: Any) -> str:
    return repr(value)[:60]


assert set(get_args(get_type_hints(Recipe)["domain"])) == set(DOMAINS)
