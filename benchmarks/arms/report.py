"""What the arms of a training step measured, as rates, memory, MFU and ratios; for a file and for people."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.arms.processes import Arms
from benchmarks.arms.setup import Setup
from benchmarks.arms.worker import MATRIX, OURS, PEERS, PUBLISHED, TRAINER
from benchmarks.record import spread
from llara_dist.config import KernelsConfig, ModelConfig
from llara_dist.cost.architecture import Architecture
from llara_dist.cost.flops import step_flops
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import Work
from llara_dist.model.llama import read_llama_config
from llara_dist.recommenders.item_table import load_item_table

TOLERANCE = {"cpu": 1e-5, "cuda": 5e-3}
"""relative difference of losses: float32, and bfloat16 with its 8 bits"""
TARGETS = {"cpu": {PUBLISHED: 3.0, TRAINER: 1.5}, "cuda": {TRAINER: 2.5, **dict.fromkeys(PEERS, 1.25)}}
"""how many times as fast we want to be"""
TARGET_MFU = {"cuda": 0.55}


def check_losses(arms: Arms, setup: Setup) -> dict[str, Any]:
    """Largest relative difference of any arm's loss from ours, in the same form of prompt."""
    ours = arms.facts[OURS]
    found: dict[str, Any] = {"ours": {form: ours[form] for form in ("hybrid_loss", "text_loss")}}
    worst = 0.0
    for name, facts in arms.facts.items():
        for form in ("hybrid_loss", "text_loss"):
            if name != OURS and form in facts:
                difference = abs(facts[form] / ours[form] - 1.0)
                found[name] = {form: facts[form], "relative_difference": difference}
                worst = max(worst, difference if math.isfinite(difference) else math.inf)
    tolerance = TOLERANCE[setup.device]
    return {**found, "tolerance": tolerance, "within_tolerance": worst <= tolerance}


def report(arms: Arms, setup: Setup, work: list[Work]) -> dict[str, Any]:
    """Rates, memory, MFU and ratios of every arm; whether the targets are met."""
    architecture = Architecture.of(read_llama_config(ModelConfig(path=setup.model)))
    items = load_item_table(Path(setup.recommender))
    timed = work[1 : 1 + len(arms.steps[OURS])]
    flops = {}
    for last_layer in ("answers", "all"):
        config = setup.run_config("cost", KernelsConfig(last_layer=last_layer))
        model = TunedModel.of(config, architecture, (items.num_items, items.dim), setup.device == "cuda")
        flops[last_layer] = [step_flops(model, step).model for step in timed]
    matrix = statistics.median(step["flops_per_second"] for step in arms.steps[MATRIX])
    ours, ours_cpu = ([step[kind] for step in arms.steps[OURS]] for kind in ("seconds", "cpu_seconds"))
    rows: dict[str, Any] = {}
    for name, steps in arms.steps.items():
        if name == MATRIX:
            continue
        if name in arms.reasons or not steps:
            rows[name] = {"does_not_run_here": arms.reasons.get(name, "no step was timed")}
            continue
        seconds, cpu = ([step[kind] for step in steps] for kind in ("seconds", "cpu_seconds"))
        rows[name] = {
            "samples_per_second": spread([setup.global_batch / value for value in seconds]),
            "tokens_per_second": spread([step.tokens / value for step, value in zip(timed, seconds, strict=True)]),
            "padded_share": padded_share(steps),
            "peak_bytes": max(step["peak_bytes"] for step in steps),
            "cpu_seconds_a_step": spread(cpu),
            **{
                key: spread([count / value / matrix for count, value in zip(flops[counted], seconds, strict=True)])
                for key, counted in (("mfu", "answers"), ("mfu_of_every_position", "all"))
            },
            "ours_is_faster_by": spread([value / mine for value, mine in zip(seconds, ours, strict=True)]),
            "ours_takes_less_cpu_by": spread([value / mine for value, mine in zip(cpu, ours_cpu, strict=True)]),
            **{k: v for k, v in arms.facts[name].items() if not k.endswith("_loss") and not k.startswith("kernels")},
        }
    return {
        "matrix_product": {"flops_per_second": round(matrix), **arms.facts[MATRIX]},
        "arms": rows,
        "targets": targets(rows, setup.device),
    }


def padded_share(steps: list[dict[str, Any]]) -> float | None:
    """Share of the computed positions that hold no token; None where an arm does not tell."""
    if "positions_so_far" in steps[-1]:
        return round(1.0 - steps[-1]["tokens_so_far"] / steps[-1]["positions_so_far"], 4)
    if "positions" not in steps[-1]:
        return None
    return round(1.0 - sum(step["tokens"] for step in steps) / sum(step["positions"] for step in steps), 4)


def targets(rows: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Each target, what was reached, and whether that is enough."""
    found = []
    for name, wanted in TARGETS[device].items():
        if name in rows:
            reached = rows[name].get("ours_is_faster_by", {}).get("median")
            met = None if reached is None else reached >= wanted
            found.append({"target": f"{wanted} x {name}", "reached": reached, "met": met})
    if device in TARGET_MFU:
        reached = rows[OURS]["mfu"]["median"]
        found.append({"target": f"MFU {TARGET_MFU[device]}", "reached": reached, "met": reached >= TARGET_MFU[device]})
    return found


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    sizes, matrix = result["sizes"], result["matrix_product"]
    lines = [
        f"{result['hardware']}; {sizes['samples_a_step']} samples ({sizes['tokens_a_step']} tokens) a step, "
        f"{sizes['rounds']} rounds; {matrix['dtype']} matrix product {matrix['flops_per_second'] / 1e12:.3g} TFLOP/s",
        f"ours: {result['ours_kernels']}",
        "",
        f"{'arm':34} {'samples/s':>10} {'tokens/s':>9} {'padded':>7} {'peak GiB':>9} {'MFU':>6}  ours faster by",
    ]
    for name, row in result["arms"].items():
        if "does_not_run_here" in row:
            lines.append(f"{name:34} does not run here: {row['does_not_run_here']}")
            continue
        share = "" if row["padded_share"] is None else f"{row['padded_share']:.1%}"
        faster = row["ours_is_faster_by"]
        lines.append(
            f"{name:34} {row['samples_per_second']['median']:>10.4g} {row['tokens_per_second']['median']:>9.4g} "
            f"{share:>7} {row['peak_bytes'] / 2**30:>9.2f} {row['mfu']['median']:>6.1%}  "
            f"{faster['median']:.2f} ({faster['min']:.2f} to {faster['max']:.2f})"
        )
    lines.append("")
    for name, row in result["same_loss"].items():
        if isinstance(row, dict) and "relative_difference" in row:
            lines.append(f"same loss as ours: {name}, relative difference {row['relative_difference']:.1e}")
    met = {True: "met", False: "NOT met", None: "not measured"}
    lines += [f"target {row['target']}: {met[row['met']]} ({row['reached']})" for row in result["targets"]]
    return "\n".join(lines)
