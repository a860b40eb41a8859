"""`llara-dist tune`: what is fastest on this machine, measured, and written as settings of a run."""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
from pathlib import Path
from typing import Any

import torch

from llara_dist import distributed
from llara_dist.autotune.bench import DoesNotFitError
from llara_dist.autotune.budget import GRAIN, largest_that_fits
from llara_dist.autotune.clock import Clock, OutOfTime
from llara_dist.autotune.found import Found
from llara_dist.autotune.measure import ModelBench
from llara_dist.autotune.questions import by_name, questions_for, start_of
from llara_dist.autotune.search import search
from llara_dist.autotune.settings import RECOMPUTE
from llara_dist.autotune.written import COLUMNS, file_text, row, settings_found
from llara_dist.config import KernelsConfig, RunConfig, TrackingConfig
from llara_dist.console import say, table, warn
from llara_dist.cost.recommend import MARGIN
from llara_dist.distributed import World
from llara_dist.ds_config import zero_stage
from llara_dist.errors import FindingsError, InputError
from llara_dist.integrity import write_file
from llara_dist.model.kernels import chooser
from llara_dist.stream.share import check_world
from llara_dist.training.fit_device import fit_device
from llara_dist.training.preflight.examine import Inputs, open_inputs
from llara_dist.training.preflight.versions import versions

WRITING_S = 1.0
"""seconds kept for writing the file"""
WINDOW_S = 0.5
"""seconds of a timed window, less where there is little time in all"""


def tune(config: RunConfig, ranks: int = 1, seconds: float = 110.0, overwrite: bool = False) -> dict[str, Any]:
    """Find the token budget and the kernels that are fastest on this machine, and write them as a further --config.

    Micro-batches of the run's own shards go through its model, forward and backward, in one process on one device;
    nothing of the run is changed. `--out FILE.yaml` names the file; it holds only what was found.

    Args:
        config: the run; its `out` is the file to write.
        ranks: that the run will have: a rank's share of a step bounds the budget.
        seconds: that it may take; when they are up, or at Ctrl-C, what is being tried is broken off and the best so
            far is written.
        overwrite: replace the file if it is there.

    Returns:
        The file, the settings in it, what was tried, and what was not for lack of time.

    Raises:
        InputError: bad input, as for `train`; several processes; no such file name; the longest sample does not fit.
    """
    clock = Clock(seconds - WRITING_S)
    out = config.out
    _check(out, ranks, seconds, overwrite)
    # Neither the run's folder nor its trackers are looked at.
    nowhere = out.with_name(f".{out.name}.tuning")
    config = dataclasses.replace(config, out=nowhere, resume="no", tracking=TrackingConfig(tensorboard=False))
    fitted = fit_device(config)
    inputs = _opened(fitted)
    data = fitted.data
    check_world(inputs.shards.longest, data.global_batch_samples, ranks, data.max_tokens_per_microbatch)
    device = distributed.pick_device(config.device, World())
    stage = zero_stage(inputs.ds_config)
    choose = chooser(config.model, device, stage)
    start = start_of(fitted, choose)
    questions, impossible = questions_for(start, choose)
    bench = ModelBench(fitted, inputs, device, ranks, window_s=min(WINDOW_S, seconds / 200))
    low, high = bench.longest, bench.most_tokens
    guess = largest_that_fits(lambda tokens: bench.is_predicted_to_fit(start.of_tokens(tokens)), low, high, high)
    found = Found(start)
    if repr(start.recompute) != repr(config.model.activation_checkpointing):  # 1 is one layer, True is all
        found.settled.add(RECOMPUTE)
    is_interrupted = False
    try:
        with clock.limit():
            search(bench, found, low, high, guess, questions, clock.left)
    except OutOfTime:
        pass
    except KeyboardInterrupt:
        if not found.has_start:
            warn(f"nothing was measured yet: {out} is not written")
            raise
        is_interrupted = True
    except DoesNotFitError:
        raise InputError(
            f"model.path={config.model.path}: with the longest sample alone ({low} tokens) it does not fit {device}; "
            "set model.activation_checkpointing=true, or see `llara-dist plan` for what holds it"
        ) from None
    if not found.has_start:
        raise InputError(f"--seconds {seconds:g}: not enough to load the model and time a micro-batch; give more")
    found.trials += impossible
    settings = settings_found(found, config.kernels, by_name(choose(KernelsConfig())))
    machine = describe_machine(device) | versions()
    notes = ["interrupted: this is the best until then"] if is_interrupted else []
    notes += advice(found, device, ranks, stage)
    write_file(out, file_text(found, settings, machine, notes))
    table(f"{config.model.path} on {machine['device']}", COLUMNS, map(row, found.trials))
    for what in found.untried:
        say(f"not tried for lack of time: {what}")
    for note in notes:
        say(note)
    say(f"written to {out}; use it with: llara-dist train --config RUN.yaml --config {shlex.quote(str(out))}")
    return {
        "out": str(out),
        "settings": settings,
        "ratio": found.ratio,
        "largest_tokens": found.largest,
        "trials": [dataclasses.asdict(trial) for trial in found.trials],
        "untried": found.untried,
        "seconds": clock.passed(),
        "machine": machine,
    }


def _check(out: Path, ranks: int, seconds: float, overwrite: bool) -> None:
    """What can be wrong with the command's own options."""
    if distributed.read_world().size > 1:
        raise InputError("llara-dist tune measures on one device, several processes were started: use one, and --ranks")
    if ranks < 1:
        raise InputError(f"--ranks {ranks}: must be at least 1")
    if not WRITING_S < seconds < float("inf"):
        raise InputError(f"--seconds {seconds:g}: must be more than {WRITING_S:g}")
    if out.suffix not in (".yaml", ".yml"):
        raise InputError(f"--out {out}: must name the file to write, FILE.yaml; give it after --config")
    if out.is_dir() or (out.exists() and not overwrite):
        raise InputError(f"{out}: exists already; remove it, choose another --out, or give --overwrite")


def _opened(config: RunConfig) -> Inputs:
    """The run's inputs; where nothing but memory stands in the way, what to do instead of tuning."""
    try:
        return open_inputs(config, World())
    except FindingsError as error:
        if {finding.check for finding in error.errors} != {"memory"}:
            raise
        raise InputError(
            f"{error.errors[0].found}; tune measures the whole model on one device: of a run that shares it out over "
            "several (ZeRO-3), take the token budget that `llara-dist plan` recommends"
        ) from None


def describe_machine(device: torch.device) -> dict[str, str]:
    """What was measured on."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "host": platform.node()}


def advice(found: Found, device: torch.device, ranks: int, stage: int) -> list[str]:
    """What a person should know beside the settings, a line each."""
    on_gpu = device.type == "cuda"
    how = "measured, and what the optimizer and ZeRO will hold is added" if on_gpu else "predicted, of one rank"
    lines = [f"memory: {how}; {MARGIN:.0%} of what was free is left"]
    lines.append(
        f"largest row that fits with the start's other settings: {found.largest} tokens, to {GRAIN} or an eighth"
    )
    if ranks > 1 or stage == 3:
        lines.append("measured on one rank: what ranks send each other, and wait for each other, is not in it")
    cores = len(os.sched_getaffinity(0)) // ranks
    if not on_gpu and torch.get_num_threads() < cores:
        lines.append(f"{torch.get_num_threads()} threads of {cores} cores were used: try OMP_NUM_THREADS={cores}")
    return lines
