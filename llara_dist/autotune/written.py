"""The file that a search leaves: settings of a run, under comments that say how they were found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llara_dist.autotune.found import Found, Trial
from llara_dist.autotune.settings import RECOMPUTE
from llara_dist.config import KernelsConfig
from llara_dist.console import GIB


def settings_found(found: Found, asked: KernelsConfig, default: KernelsConfig) -> dict[str, Any]:
    """What a run is to be given, nested as in its YAML: the budget, and of the rest only what was settled.

    A kernel is named where it is another than the default comes to here: a name holds for this machine alone, `auto`
    wherever the run is taken.

    Args:
        found: what the search came to.
        asked: the run's own.
        default: what the default comes to on this machine, without `auto`.
    """
    best = found.best
    settings: dict[str, Any] = {"data": {"max_tokens_per_microbatch": best.tokens}}
    if RECOMPUTE in found.settled:
        settings["model"] = {RECOMPUTE: best.recompute}
    kernels: dict[str, Any] = {}
    for name, plain in vars(KernelsConfig()).items():
        value = best.value(name)
        if name not in found.settled:
            continue
        if value != getattr(default, name):
            kernels[name] = value
        elif getattr(asked, name) != plain:
            kernels[name] = plain
    if kernels:
        settings["kernels"] = kernels
    return settings


COLUMNS = ["tried", "tokens", "tokens/s", "to the start", "memory, GiB", "verdict"]


def row(trial: Trial) -> list[str]:
    """A trial as a line of a table."""
    return [
        trial.what,
        str(trial.tokens),
        "" if trial.tokens_per_s is None else f"{trial.tokens_per_s:,.0f}",
        "" if trial.ratio is None else f"{trial.ratio:.3f}",
        "" if trial.peak_bytes is None else f"{trial.peak_bytes / GIB:.2f}",
        trial.verdict,
    ]


def file_text(found: Found, settings: dict[str, Any], machine: dict[str, str], notes: Iterable[str]) -> str:
    """The YAML file's text.

    Args:
        found: what the search came to.
        settings: as `settings_found` gives them.
        machine: what was measured on, by name.
        notes: more to know, a line each.
    """
    import yaml

    lines = ["Made by `llara-dist tune`, for this machine, model and data; give it to `train` as a further --config."]
    lines += [f"{name}: {value}" for name, value in machine.items()]
    lines += ["", " | ".join(COLUMNS)]
    lines += [" | ".join(cell or "-" for cell in row(trial)) for trial in found.trials]
    lines += [f"{what} | not tried for lack of time" for what in found.untried]
    lines += ["", *notes]
    comments = "\n".join(f"# {' '.join(line.split())}".rstrip() for line in lines)
    return f"{comments}\n{yaml.safe_dump(settings, sort_keys=False)}"
