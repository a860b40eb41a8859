"""A run that is killed again and again at random moments, as a script: imported once, each start is a fork.

usage: python -m tests.distributed.kills INPUTS FOLDER KILLS SEED
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from llara_dist.config import CheckpointConfig, LoraConfig, RunConfig
from llara_dist.training.metrics_log import read_metrics
from llara_dist.tuning import train
from tests.runs import run_config

STEPS = 120
FILES = ("adapter_model.safetensors", "projector.safetensors", "optimizer.safetensors")


def config_of(inputs: Path, out: Path) -> RunConfig:
    """Dropout on, so that every generator counts; a checkpoint every two steps, so that many kills fall into saves."""
    return dataclasses.replace(
        run_config(inputs, out, max_steps=STEPS),
        lora=LoraConfig(dropout=0.1),
        checkpoint=CheckpointConfig(every_steps=2, keep_last=2),
        resume="auto",
    )


def start(config: RunConfig) -> int:
    """One start of the run in a process of its own; returns its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        log = os.open(f"{config.out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        train(config)
        code = 0
    finally:
        os._exit(code)


def wait(process: int, seconds: float) -> int | None:
    """Its exit code, or None where it still runs after so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def main(inputs: Path, folder: Path, kills: int, seed: int) -> None:
    """Run once undisturbed, then with SIGKILLs, anew when it got to its end; print what happened as one JSON line.

    Every run that gets to its end must have the undisturbed one's parameters and optimizer state, bit for bit.
    """
    torch.set_num_threads(1)
    # Import what a start imports, so that a fork costs no second of it; nothing here may start a thread.
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    whole, cut = config_of(inputs, folder / "whole"), config_of(inputs, folder / "killed")
    began = time.monotonic()
    process = start(whole)
    while not read_metrics(whole.out / "metrics.jsonl"):
        time.sleep(0.005)
    startup = time.monotonic() - began
    assert wait(process, 600) == 0, (folder / "whole.log").read_text()
    undisturbed = time.monotonic() - began
    # A start that is killed gets on by a few steps at most, so that one run sees most of the kills.
    longest = startup + 0.08 * (undisturbed - startup)
    draw = random.Random(seed)
    killed, in_save, completed = 0, 0, 0
    while killed < kills or not completed:
        process = start(cut)
        code = wait(process, draw.uniform(0.0, longest) if killed < kills else 600.0)
        if code is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            killed += 1
            in_save += any((cut.out / "checkpoints").glob(".*staging"))
            continue
        assert code == 0, (folder / "killed.log").read_text()
        for name in FILES:
            theirs, ours = (run.out / "checkpoints" / f"step-{STEPS:08d}" / name for run in (whole, cut))
            assert theirs.read_bytes() == ours.read_bytes(), f"{name} differs after {killed} kills"
        completed += 1
        if killed < kills:
            shutil.rmtree(cut.out)
    print(
        json.dumps(
            {
                "kills": killed,
                "in_save": in_save,
                "completed": completed,
                "startup_s": startup,
                "undisturbed_s": undisturbed,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
