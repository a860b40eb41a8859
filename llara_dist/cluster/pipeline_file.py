"""A pipeline file: steps, what each asks for, and the artifacts that are given.

given: {data: data/movielens}          # artifacts that are there already; their steps are left out
resources: {time: "1:00:00"}           # of every step that does not say otherwise
steps:
  recommender: {options: {epochs: 30}}
  shards: {parts: 16, options: {tokenizer: LLM}}
  train: {nodes: 2, gpus_per_node: 8, config: [movielens.yaml], options: {model.path: LLM}}
  evaluate: {gpus_per_node: 8}
  report: {}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llara_dist.cluster.batch_script import Resources
from llara_dist.errors import InputError

NEEDS: Mapping[str, tuple[str, ...]] = {
    "prepare": (),
    "recommender": ("prepare",),
    "shards": ("prepare",),
    "merge": ("shards",),
    "train": ("recommender", "merge"),
    "evaluate": ("train",),
    "report": ("evaluate",),
}
"""Steps in their order, and the earlier ones that each waits for."""
MAKES = {"data": "prepare", "recommender": "recommender", "shards": "merge", "run": "train"}
"""Which step makes an artifact that may be given."""


@dataclass(frozen=True)
class Step:
    """One step of a pipeline file.

    Attributes:
        resources: of its job.
        signal_s: seconds before the time limit at which a run saves and is requeued.
        options: of its command, by name.
        config: files of a run's settings, later ones override earlier ones; of `train` alone.
        parts: jobs that the shards are built by; of `shards` alone.
    """

    resources: Resources = field(default_factory=Resources)
    signal_s: int = 300
    options: Mapping[str, Any] = field(default_factory=dict)
    config: tuple[str, ...] = ()
    parts: int = 1


@dataclass(frozen=True)
class Pipeline:
    """A pipeline file.

    Attributes:
        steps: by name, in order; merge is there where shards is.
        given: artifacts that are there already, by name: data, recommender, shards, run.
    """

    steps: Mapping[str, Step]
    given: Mapping[str, Path]

    def artifact(self, name: str, out: Path) -> Path:
        """Where an artifact lies or will lie: data, recommender, shards or run."""
        return self.given.get(name, out / name)


def read_pipeline(path: Path) -> Pipeline:
    """Read and check a pipeline file.

    Raises:
        InputError: missing or no YAML; an unknown or bad field; a step whose input no step makes and none is given.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return parse_pipeline(values)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); see launch/pipelines") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def parse_pipeline(values: Any) -> Pipeline:
    """A pipeline from a file's values.

    Raises:
        InputError: an unknown or bad field; a step whose input no step makes and none is given.
    """
    _require_fields(values, ("given", "resources", "steps"), "the file")
    given = values.get("given") or {}
    _require_fields(given, tuple(MAKES), "given")
    written = values.get("steps")
    _require_fields(written, tuple(NEEDS), "steps")
    common = values.get("resources") or {}
    steps = {name: _step(name, written[name] or {}, common) for name in NEEDS if name in written}
    if "shards" in steps:
        merge = steps.get("merge") or _step("merge", {}, common)
        steps = {name: {**steps, "merge": merge}[name] for name in NEEDS if name in steps or name == "merge"}
    made = {MAKES[name] for name in given}
    for name in steps:
        for need in NEEDS[name]:
            if need not in steps and need not in made:
                artifact = next((made for made, step in MAKES.items() if step == need), None)
                remedy = f"add the step {need}" + (f", or give given.{artifact}" if artifact else "")
                raise InputError(f"steps.{name}: nothing makes its input; {remedy}")
        if name in made:
            raise InputError(f"steps.{name}: its artifact is given; leave out one of the two")
    return Pipeline(steps, {name: Path(str(place)) for name, place in given.items()})


def _step(name: str, values: Any, common: Any) -> Step:
    """One step from its mapping; `common` holds resources of every step."""
    where = f"steps.{name}"
    asked = [item.name for item in dataclasses.fields(Resources)]
    own = {"train": ("config",), "shards": ("parts",)}.get(name, ())
    _require_fields(common, asked, "resources")
    _require_fields(values, (*asked, "signal_s", "options", *own), where)
    resources = {key: value for key, value in {**common, **values}.items() if key in asked}
    for key, value in resources.items():
        if key in ("gpus_per_node", "cpus_per_task"):
            _require(type(value) is int, f"{where}.{key} must be a whole number, found {value!r}")
        elif key == "nodes":
            resources[key] = str(value)
        else:  # YAML reads 12:00:00 as a number
            _require(isinstance(value, str), f"{where}.{key} must be text, found {value!r}; put it in quotes")
    options, config, parts = values.get("options") or {}, values.get("config") or [], values.get("parts", 1)
    _require(isinstance(options, dict), f"{where}.options must be a mapping, found {options!r:.60}")
    _require(isinstance(config, list), f"{where}.config must be a list of files, found {config!r:.60}")
    _require(type(parts) is int and 1 <= parts <= 99999, f"{where}.parts must be 1 to 99999, found {parts!r}")
    signal_s = values.get("signal_s", 300)
    _require(type(signal_s) is int, f"{where}.signal_s must be a whole number, found {signal_s!r}")
    return Step(Resources(**resources), signal_s, options, tuple(map(str, config)), parts)


def _require_fields(values: Any, known: Iterable[str], where: str) -> None:
    known = list(known)
    _require(isinstance(values, dict), f"{where} must be a mapping, found {values!r:.60}; known are {', '.join(known)}")
    for name in values:
        _require(name in known, f"unknown field {name!r} in {where}; known are {', '.join(known)}")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise InputError(message)
