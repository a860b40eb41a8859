"""The whole way on the built-in synthetic world: data, recommender, shards, two tuned arms, evaluation, report."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llara_dist.console import say
from llara_dist.errors import InputError

ARMS = {"text-only": ("constant", 0.0), "hybrid": ("linear", 1.0)}
"""Arms by name: curriculum schedule and its probability. Text-only is tuned for the same steps on the same samples."""


@dataclass(frozen=True)
class Settings:
    """What makes the quickstart fit five minutes on two CPU cores; recorded in the report.

    Attributes:
        steps: optimizer steps of each arm.
        global_batch_samples: samples a step.
        max_tokens_per_microbatch: token budget of a packed row.
        lora_rank: r of the adapters; α = 2 r.
        lora_lr: peak rate of the adapters.
        projector_lr: peak rate of the projector.
        recommender_epochs: most epochs of SASRec.
    """

    steps: int = 240
    global_batch_samples: int = 32
    max_tokens_per_microbatch: int = 4096
    lora_rank: int = 8
    lora_lr: float = 2e-3
    projector_lr: float = 5e-3
    recommender_epochs: int = 12


def quickstart(out: Path = Path("quickstart_out"), ranks: int = 0, steps: int = 0) -> dict[str, Any]:
    """Tune text-only and hybrid from the same base on the same samples, and write an HTML report of what came out.

    Args:
        out: a new folder for everything that is made; the report is OUT/report.html.
        ranks: processes that train and evaluate; 0 = two where there are two cores (or GPUs), else one.
        steps: optimizer steps of each arm; 0 = the default.

    Raises:
        InputError: `out` exists, or a step failed; its output is in OUT/logs.
    """
    from llara_dist.data.build import build
    from llara_dist.data.prepare import prepare
    from llara_dist.model.tiny import tiny_base

    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: holds something already; remove it or choose another --out")
    settings = Settings() if steps == 0 else Settings(steps=steps)
    if ranks < 0 or steps < 0:
        raise InputError(f"--ranks {ranks} and --steps {steps} must not be negative")
    ranks = ranks or default_ranks()
    data, recommender, shards = out / "data", out / "recommender", out / "shards"
    seconds: dict[str, float] = {}

    def stage(name: str, action: Callable[[], Any]) -> Any:
        say(f"\n== {name}")
        started = time.perf_counter()
        result = action()
        seconds[name] = time.perf_counter() - started
        say(f"   {seconds[name]:.0f} s")
        return result

    base = tiny_base()
    stage("prepare", lambda: prepare(recipe="synthetic", out=data))
    options = ["--data", str(data), "--out", str(recommender), "--positions", "all"]
    options += ["--epochs", str(settings.recommender_epochs)]
    stage("recommender", lambda: launch(["recommender", "train", *options], 1, out, "recommender"))
    stage("shards", lambda: build(data=data, tokenizer=str(base), out=shards, processes=ranks))
    for arm in ARMS:
        options = train_options(arm, settings, base, shards, recommender, out / arm)
        stage(f"train {arm}", lambda options=options, arm=arm: launch(["train", *options], ranks, out, f"train-{arm}"))
    results = {}
    for arm in ARMS:
        options = ["--run", str(out / arm), "--split", "test", "--batch_size", "16", "--max_new_tokens", "16"]
        results[arm] = stage(
            f"evaluate {arm}",
            lambda options=options, arm=arm: launch(["evaluate", *options], ranks, out, f"eval-{arm}"),
        )
    page = stage("report", lambda: report(out, settings, base, ranks, seconds))
    for sentence in page["findings"]:
        say(sentence)
    say(f"\nreport: {out / 'report.html'}")
    return {"out": str(out), "report": str(out / "report.html"), "seconds": seconds, **page}


def default_ranks() -> int:
    """Two processes where there are two GPUs, or no GPU and two cores; else one."""
    import torch

    return min(2, torch.cuda.device_count() if torch.cuda.is_available() else os.cpu_count() or 1)


def report(out: Path, settings: Settings, base: Path, ranks: int, seconds: dict[str, float]) -> dict[str, Any]:
    """Write OUT/report.html from what lies under `out`; states what came out, whatever it is.

    Returns:
        The page's numbers: "findings", "arms", "comparisons".
    """
    from llara_dist.data.dataset import load_dataset
    from llara_dist.evaluation.arms import evaluated_arm, random_arm, recommender_arm
    from llara_dist.evaluation.report import run_curve, write_report
    from llara_dist.integrity import read_json
    from llara_dist.training.preflight.versions import versions

    dataset = load_dataset(out / "data")
    rows, shown = dataset.candidates["test"].shape
    steps = f"{settings.steps} steps of {settings.global_batch_samples} samples"
    arms = [
        random_arm(dataset.test.keys, shown),
        recommender_arm("SASRec", "the frozen recommender alone", out / "data", out / "recommender"),
        evaluated_arm("text-only", f"the base tuned on titles alone, {steps}", out / "text-only/evaluation/test-text"),
        evaluated_arm(
            "hybrid",
            f"the same base and samples, titles and behaviour tokens, p from 0 to 1 over {steps}",
            out / "hybrid/evaluation/test-hybrid",
        ),
    ]
    made = read_json(base / "pretraining.json", "how the tiny base was made")
    return write_report(
        out / "report.html",
        title="llara_dist quickstart",
        lead=(
            f"A tiny Llama ({made['parameters'] / 1e6:.1f} M parameters, 4-bit NF4) tuned as a recommender on a "
            f"synthetic world of {dataset.num_items} items, judged on {rows:,} test rows of {shown} candidates each."
        ),
        arms=arms,
        comparisons=[("hybrid", "text-only"), ("text-only", "random"), ("hybrid", "SASRec")],
        curves=[run_curve(arm, out / arm) for arm in ARMS],
        settings={
            "Tuning": {**dataclasses.asdict(settings), "ranks": ranks, "ds_config": "zero0"},
            "World": dataset.info["recipe"]["source"]["settings"] | {"candidates": shown},
        },
        seconds=seconds,
        environment=versions() | {"processor cores": str(os.cpu_count())},
        notes=[
            "The world is made up: part of what users do follows a word in the titles, part follows a hidden group of "
            "items that only co-consumption shows. Text alone can see the first, behaviour tokens the second as well.",
            "The base was pre-trained on other random catalogues of the same kind, with behaviour vectors under random "
            "maps: it can read, match and copy, but has seen neither these titles' roles nor these users.",
            "What this shows is that the whole way works, and what the method adds here; it says nothing about real "
            "catalogues or large models.",
        ],
    )


def train_options(arm: str, settings: Settings, base: Path, shards: Path, recommender: Path, out: Path) -> list[str]:
    """The command-line options that train one arm."""
    schedule, probability = ARMS[arm]
    values = {
        "model.path": base,
        "model.bits": 4,
        "data.shards": shards,
        "data.max_steps": settings.steps,
        "data.epochs": 50,
        "data.global_batch_samples": settings.global_batch_samples,
        "data.max_tokens_per_microbatch": settings.max_tokens_per_microbatch,
        "data.workers": 0,
        "recommender.path": recommender,
        "lora.rank": settings.lora_rank,
        "lora.alpha": 2 * settings.lora_rank,
        "lora.dropout": 0.0,
        "optimizer.lora_lr": settings.lora_lr,
        "optimizer.projector_lr": settings.projector_lr,
        "curriculum.schedule": schedule,
        "curriculum.probability": probability,
        "checkpoint.every_steps": 0,
        "out": out,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def launch(arguments: list[str], ranks: int, out: Path, name: str) -> dict[str, Any]:
    """Run one command on `ranks` processes through the deepspeed launcher, and return its JSON result.

    Args:
        arguments: of `llara-dist`.
        ranks: number of processes; one is started plainly.
        out: the quickstart's folder; the output goes to OUT/logs/NAME.log as well.
        name: of the log.

    Raises:
        InputError: the command failed; the message says where its output is.
    """
    log = out / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    rendezvous = (out / "logs" / f"{name}.rendezvous").resolve()
    rendezvous.unlink(missing_ok=True)
    starter = [sys.executable, "-m", "llara_dist.cli"]
    if ranks > 1:
        starter = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
        starter += ["--no_local_rank", "--module", "llara_dist.cli"]
    environment = {
        **os.environ,
        # Matrices this small gain nothing from a second thread, and two threads that share a core wait for each other.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "LLARA_DIST_INIT_METHOD": f"file://{rendezvous}",
    }
    result: dict[str, Any] = {}
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*starter, *arguments, "--json"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if line.startswith("{"):
                result = json.loads(line)
            elif line.startswith(("step ", "epoch ", "error: ")):
                say(f"   {line.rstrip()}")
        code = process.wait()
    rendezvous.unlink(missing_ok=True)
    if code != 0:
        raise InputError(f"`llara-dist {arguments[0]}` ended with exit code {code}; its output is in {log}")
    return result
