"""A pipeline → jobs that wait for each other: prepare, recommender, shards, merge, train, evaluate, report.

Every artifact appears whole or not at all, so a step whose artifact is there is done: submitted again, a pipeline goes
on with what is missing and everything after it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llara_dist.cluster import records
from llara_dist.cluster.batch_script import INDEX, JobDescription
from llara_dist.cluster.pipeline_file import MAKES, NEEDS, Pipeline, read_pipeline
from llara_dist.cluster.run_settings import check_run, settings_files
from llara_dist.cluster.submission import Submission, checkout
from llara_dist.config import to_dict
from llara_dist.console import say
from llara_dist.data.parts import PART, Part
from llara_dist.ds_config import load_ds_config
from llara_dist.errors import InputError
from llara_dist.integrity import sha256_json
from llara_dist.run_options import message_of, parse_run
from llara_dist.training.checkpoints.folders import MARKER, STATE, checkpoint_folders

FUNCTIONS = {
    "prepare": "llara_dist.data.prepare:prepare",
    "recommender": "llara_dist.recommenders.training:train",
    "shards": "llara_dist.data.build:build",
    "merge": "llara_dist.data.parts:merge",
    "train": "llara_dist.tuning:train",
    "evaluate": "llara_dist.evaluation.evaluate:evaluate",
    "report": "llara_dist.evaluation.compare_runs:report",
}
"""The function whose arguments are a step's options; those of `train` are a run's settings."""
COMMANDS = {
    "prepare": ("prepare",),
    "recommender": ("recommender", "train"),
    "shards": ("shards", "build"),
    "merge": ("shards", "merge"),
    "train": ("train",),
    "evaluate": ("evaluate",),
    "report": ("report",),
}
REPORT = "report.html"


def pipeline_submissions(path: Path, out: Path, check: bool) -> list[Submission]:
    """The jobs of what is still to do, in order; nothing is written.

    Args:
        path: the pipeline file.
        out: folder of the artifacts, OUT/data, OUT/recommender, OUT/shards, OUT/run, OUT/report.html, and of the jobs.
        check: whether to parse every step's options now rather than when its turn comes, and to look at the run as
            `preflight` does where its inputs are there already.

    Raises:
        InputError: a bad pipeline; an artifact under `out` was made with other options than the file's.
    """
    pipeline, out = read_pipeline(path), out.resolve()
    try:
        due = steps_due(pipeline, out)
        for name in pipeline.steps:
            words = step_words(name, pipeline, out)
            if check and name != "train":
                parse_options(FUNCTIONS[name], words)
            if name not in due:
                require_same_settings(name, settings_hash(name, words), out)
                say(f"{name}: done already")
        folders = dict(zip(due, records.next_folders(out, len(due)), strict=True))
        return [_submission(name, pipeline, out, folders, check) for name in due]
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def steps_due(pipeline: Pipeline, out: Path) -> list[str]:
    """The steps whose artifact is missing, and all that wait for one of them.

    Raises:
        InputError: an artifact is there whose input is to be made anew.
    """
    due: list[str] = []
    for name in pipeline.steps:
        anew = [need for need in NEEDS[name] if need in due]
        done = is_done(name, pipeline, out)
        # Evaluations and reports replace earlier ones.
        if done and anew and name not in ("evaluate", "report"):
            place = pipeline.artifact({"train": "run"}.get(name, name if name in MAKES else "shards"), out)
            made_from = f"{place} was made from what {anew[0]} is to make anew"
            raise InputError(f"steps.{name}: {made_from}; remove it, or choose another --out")
        if anew or not done:
            due.append(name)
    return due


def is_done(name: str, pipeline: Pipeline, out: Path) -> bool:
    """Whether a step's artifact is there; of `train` only once the newest checkpoint is the last step's."""
    data, recommender, shards, run = (pipeline.artifact(artifact, out) for artifact in MAKES)
    if name == "shards":
        parts = pipeline.steps["shards"].parts
        folders = [Part(index, parts).folder(shards) for index in range(parts)]
        return is_done("merge", pipeline, out) or all((folder / PART).is_file() for folder in folders)
    if name == "train":
        return is_trained(run)
    if name == "evaluate":
        split = pipeline.steps["evaluate"].options.get("split", "test")
        return any((run / "evaluation").glob(f"{split}-*/metrics.json"))
    marks = {
        "prepare": data / "dataset.json",
        "recommender": recommender / "recommender.json",
        "merge": shards / "shards.json",
        "report": out / REPORT,
    }
    return marks[name].is_file()


def is_trained(run: Path) -> bool:
    """Whether a run has done all its steps. One that ended early by validation counts as not: asked again, it ends."""
    for folder in reversed(checkpoint_folders(run / "checkpoints")):
        if (folder / MARKER).is_file():
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            return bool(state["step"] >= state["total_steps"])
    return False


def step_words(name: str, pipeline: Pipeline, out: Path) -> list[str]:
    """Words of a step's command after its name, each "--option=value"; of `train` its settings'.

    Raises:
        InputError: an option that the pipeline itself sets.
    """
    data, recommender, shards, run = (str(pipeline.artifact(artifact, out)) for artifact in MAKES)
    step = pipeline.steps[name]
    fixed: dict[str, Any] = {
        "prepare": {"out": data},
        "recommender": {"data": data, "out": recommender},
        "shards": {"data": data, "out": shards, "part": f"{INDEX}/{step.parts}"},
        "merge": {"out": shards},
        "train": {"data.shards": shards, "recommender.path": recommender, "out": run},
        "evaluate": {"run": run},
        "report": {"runs": [run], "out": str(out / REPORT)},
    }[name]
    if name == "report" and ("prepare" in pipeline.steps or "data" in pipeline.given):
        fixed["data"] = data
    options = dict(step.options)
    if name == "report":
        options.setdefault("title", out.name)  # every pipeline's run is called run
    if name == "report" and "evaluate" in pipeline.steps:
        split = pipeline.steps["evaluate"].options.get("split", "test")
        if options.setdefault("split", split) != split:
            raise InputError(f"steps.report.options.split: {options['split']}, but steps.evaluate does {split}")
    for option in options:
        if option in fixed:
            raise InputError(f"steps.{name}.options.{option}: the pipeline sets it; leave it out")
    files = [f"--config={file}" for file in step.config]
    return files + [f"--{option}={_word(value)}" for option, value in {**options, **fixed}.items()]


def require_same_settings(name: str, settings: str, out: Path) -> None:
    """A step that is done was done with the options that the file has now, as far as the job is on record.

    Raises:
        InputError: with others.
    """
    made = [job.record.settings for job in records.jobs_of(out) if job.record.step == name]
    if made and made[-1] != settings:
        raise InputError(f"steps.{name}: done with other options already; remove what it made, or choose another --out")


def settings_hash(name: str, words: list[str]) -> str:
    """What a step's artifact depends on: its words; of `train` what they and the files that they name say."""
    if name != "train":
        return sha256_json(words)
    config = parse_run(words)
    return sha256_json([to_dict(dataclasses.replace(config, deepspeed=Path())), load_ds_config(config.deepspeed)])


def parse_options(function: str, words: list[str]) -> None:
    """Parse a step's options as its command will.

    Raises:
        InputError: an unknown option or a bad value.
    """
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    module, _, attribute = function.partition(":")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(getattr(importlib.import_module(module), attribute), as_group=False)
    try:
        parser.parse_args(words)
    except ArgumentError as error:
        raise InputError(message_of(error)) from None


def _submission(name: str, pipeline: Pipeline, out: Path, folders: Mapping[str, Path], check: bool) -> Submission:
    step, words, folder = pipeline.steps[name], step_words(name, pipeline, out), folders[name]
    files: dict[str, str] = {}
    runs, array = {"": "."}, ""
    settings = settings_hash(name, words)
    if name == "train":
        config = parse_run(words)
        config.require_inputs()
        if check and not set(NEEDS[name]) & set(folders):
            check_run(config, step.resources)
        files = settings_files(config, folder)
        words = ["--config", str(folder / "run.yaml"), "--resume", "auto"]
    if name in ("train", "evaluate"):
        runs = {"": os.path.relpath(pipeline.artifact("run", out), out)}
    if name == "shards":
        array = f"1-{step.parts}"
        runs = {str(part): "." for part in range(1, step.parts + 1)}
    job = JobDescription(
        name=f"{out.name}-{name}",
        command=(*COMMANDS[name], *words),
        folder=folder,
        directory=Path.cwd(),
        resources=step.resources,
        array=array,
        signal_s=step.signal_s,
        after=tuple(need for need in NEEDS[name] if need in folders),
        source=checkout(),
    )
    return Submission(job, name, runs, files, settings)


def _word(value: Any) -> str:
    """A YAML value as the text of an option."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
