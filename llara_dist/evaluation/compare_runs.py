"""`llara-dist report`: evaluated runs side by side on one HTML page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from llara_dist.console import say
from llara_dist.errors import InputError
from llara_dist.evaluation.arms import Arm, evaluated_arm, random_arm, recommender_arm
from llara_dist.evaluation.report import run_curve, write_report
from llara_dist.integrity import read_json
from llara_dist.training.preflight.versions import versions

SHOWN = ("lora", "projector", "curriculum", "optimizer", "data")
"""sections of a run's settings on the page"""
BASELINES = (RANDOM := "random", RECOMMENDER := "recommender")
"""arms that are no run"""


def report(
    runs: list[Path],
    out: Path,
    split: Literal["val", "test"] = "test",
    data: Path | None = None,
    title: str = "",
) -> dict[str, Any]:
    """Put evaluated runs side by side: HR@1 with intervals, paired differences, curves, settings.

    Args:
        runs: folders of runs that `llara-dist evaluate` has been through; the first is compared with each other one.
        out: the HTML file to write, replaced if it is there.
        split: which evaluations.
        data: the runs' dataset folder; with it the frozen recommender alone is shown as well.
        title: of the page.

    Returns:
        The page's numbers: "findings", "arms", "comparisons".

    Raises:
        InputError: a run has no evaluation of the split, or the runs were evaluated on different rows.
    """
    if not runs:
        raise InputError("--runs: give at least one run's folder")
    names = _names(runs)
    configs = {run: read_json(run / "config.json", "a run's settings") for run in runs}
    evaluated = [arm for run in runs for arm in _arms(run, names[run], split)]
    shown = int(read_json(_evaluations(runs[0], split)[0] / "metrics.json", "an evaluation")["candidates"])
    arms = [random_arm(evaluated[0].keys, shown)]
    if data is not None:
        weights = Path(configs[runs[0]]["recommender"]["path"])
        arms.append(recommender_arm(RECOMMENDER, "the frozen recommender alone", data, weights, split))
    first, *others = [arm.name for arm in evaluated]
    comparisons = [(first, name) for name in (*others, *(arm.name for arm in arms))]
    rows = len(evaluated[0].keys)
    try:
        result = write_report(
            out,
            title=title or ", ".join(names.values()),
            lead=f"{rows:,} rows of the {split} split, {shown} candidates each.",
            arms=[*arms, *evaluated],
            comparisons=comparisons,
            curves=[run_curve(names[run], run) for run in runs],
            settings={f"{names[run]}: {section}": configs[run][section] for run in runs for section in SHOWN},
            environment=versions() | {"processor cores": str(os.cpu_count())},
        )
    except ValueError as error:
        raise InputError(f"--runs: {error}; evaluate all of them on the same split of the same data set") from None
    for sentence in result["findings"]:
        say(sentence)
    say(f"report: {out}")
    return {"out": str(out), **result}


def _names(runs: Sequence[Path]) -> dict[Path, str]:
    """A short name for each run, no two the same: its folder's, with as many of those above as that takes.

    Raises:
        InputError: a folder is given twice.
    """
    paths = [run.resolve() for run in runs]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise InputError(f"--runs: {runs[place]}: given twice; name each run once")
    lengths = [1] * len(paths)
    while True:
        names = [str(Path(*path.parts[-length:])) for path, length in zip(paths, lengths, strict=True)]
        unclear = [names.count(name) > 1 or name in BASELINES for name in names]
        if not any(unclear):
            return dict(zip(runs, names, strict=True))
        lengths = [length + more for length, more in zip(lengths, unclear, strict=True)]


def _evaluations(run: Path, split: str) -> list[Path]:
    """The run's evaluations of a split, by name: of the whole split where there are any, else of its first rows.

    Raises:
        InputError: there is none.
    """
    found = sorted(path.parent for path in (run / "evaluation").glob(f"{split}-*/metrics.json"))
    if not found:
        raise InputError(
            f"{run}: no evaluation of the {split} split; `llara-dist evaluate --run {run} --split {split}`"
        )
    return [path for path in found if "-first-" not in path.name] or found


def _arms(run: Path, name: str, split: str) -> list[Arm]:
    folders = _evaluations(run, split)
    arms = []
    for folder in folders:
        metrics = read_json(folder / "metrics.json", "an evaluation")
        about = f"{metrics['form']} form, the {metrics['checkpoint']} checkpoint, after {metrics['step']} steps"
        arms.append(evaluated_arm(name if len(folders) == 1 else f"{name}, {folder.name}", about, folder))
    return arms
