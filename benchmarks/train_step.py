"""A training step of this package against the published method's own way and the field's trainers, in one run.

    PYTHONPATH=. python benchmarks/train_step.py [--ablate] [--peers PYTHON] [--out RESULT.json]
    PYTHONPATH=. python benchmarks/train_step.py --shards SHARDS --recommender REC --model LLAMA

Every arm computes the same optimizer steps, on the same samples, with the same model shape, LoRA (r 8, α 32, dropout
0.1, seven targets), AdamW and clipping:

- ours: what `llara-dist train` runs, all samples hybrid; with --ablate also with each optimisation switched off;
- published method: written anew from the paper's description (arms/published.py says how);
- HF Trainer: transformers' Trainer, PEFT, bitsandbytes NF4, padded, on text (arms/trainers.py); with --ablate also
  grouped by length;
- TRL padding-free, Unsloth, LLaMA-Factory: with the interpreter that --peers names, else with this one; an arm that
  does not run says why.

Before anything is timed, ours and the published method must give the same loss on the same hybrid samples, ours and the
text trainers on the same text-only samples, dropout off and all adapters at the same values.

Each arm is a process of its own. On the CPU they take turns, step by step, in an order that rotates; on a GPU, which
holds one 7B model's step at a time, each computes all its steps in turn. Medians over the rounds; a ratio is the median
of the rounds' ratios. Other work on a CPU's cores distorts wall time; the result has CPU seconds beside it, which it
distorts less. The result is written after every arm, on the CPU after every round, and names the arms that are still to
come: a run that is broken off leaves what it measured. Without --shards the inputs are a synthetic world with
MovieLens' lengths and a Llama with random NF4 weights (Llama-2-7B's shape on a GPU).

MFU counts what the mathematics of a step needs (llara_dist/cost/flops.py: about 4 N FLOPs a token, no recomputation, no
padding, head and last layer for the answers alone), the same for every arm, against a matrix product measured in the
same run; beside it stands what it would be with the last layer counted at every position.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.arms.inputs import SHAPES, make_inputs, write_random_nf4
from benchmarks.arms.setup import ROOT, Setup
from benchmarks.arms.turns import Worker
from benchmarks.arms.worker import GROUPED, MATRIX, OURS, PEERS, PUBLISHED, TRAINER
from llara_dist.config import KernelsConfig, ModelConfig
from llara_dist.cost.architecture import Architecture
from llara_dist.cost.flops import step_flops
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import Work
from llara_dist.integrity import json_text, read_json, write_json
from llara_dist.model.llama import read_llama_config
from llara_dist.model.quantize import quantize
from llara_dist.recommenders.item_table import load_item_table
from llara_dist.stream.batch import collate

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "triton", "liger_kernel", "flash_attn")
PACKAGES = ("trl", "unsloth", "llamafactory")
OFF = {"attention": "sdpa", "projector": "eager", "lora": "peft", "layers": "torch", "last_layer": "all"}
"""each optimisation switched off"""
TOLERANCE = {"cpu": 1e-5, "cuda": 5e-3}
"""relative difference of losses: float32, and bfloat16 with its 8 bits"""
TARGETS = {"cpu": {PUBLISHED: 3.0, TRAINER: 1.5}, "cuda": {TRAINER: 2.5, **dict.fromkeys(PEERS, 1.25)}}
"""how many times as fast we want to be"""
TARGET_MFU = {"cuda": 0.55}
LAST_LINES = 25
"""shown of what an arm that fails has printed"""


def main() -> None:
    """Measure, print, write."""
    options = parse()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        setup = prepare(options, Path(name))
        prepared = time.perf_counter() - begun
        work = [Work.of([collate(step, np.ones(len(step), dtype=bool))]) for step in setup.batches()]
        arms = Arms(setup, options.peers or sys.executable)
        names = [MATRIX, OURS, PUBLISHED, TRAINER, *PEERS]
        if options.arms:
            names = [MATRIX, OURS, *(name for name in names if name in options.arms and name not in (MATRIX, OURS))]
        result: dict[str, Any] = {}
        for to_come in arms.measure(names, options.ablate):
            result = {
                "what": "benchmarks/train_step.py",
                "hardware": hardware(setup.device, setup.threads),
                "versions": versions(options.peers),
                "load_average": os.getloadavg(),
                "model": {"shape": options.shape, "path": options.model},
                "sizes": {
                    "samples_a_step": setup.global_batch,
                    "tokens_a_step": round(statistics.mean(step.tokens for step in work)),
                    "most_tokens_of_a_packed_row": setup.budget,
                    "rows_of_a_padded_micro_batch": setup.rows,
                    "rounds": len(arms.steps[OURS]),
                    "threads": setup.threads,
                },
                "arms_to_come": to_come,
                "same_loss": check_losses(arms, setup),
                "ours_kernels": arms.facts[OURS].get("kernels_shown", ""),
                **report(arms, setup, work),
                "seconds": {"inputs": round(prepared, 1), "all": round(time.perf_counter() - begun, 1)},
            }
            if options.out:
                write_json(options.out, result)
    print(table(result))
    if not options.out:
        print(json_text(result), end="")
    if not result["same_loss"]["within_tolerance"]:
        raise SystemExit("the arms do not compute the same loss: their times cannot be compared")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="of the random Llama; 7b on a GPU, else small")
    parser.add_argument("--shards", help="shards folder; with --recommender and --model")
    parser.add_argument("--recommender")
    parser.add_argument("--model", help="Llama folder; what is not quantised will be")
    parser.add_argument("--inputs", type=Path, help="folder that benchmarks/arms/inputs.py made, instead of all three")
    parser.add_argument("--rounds", type=int, help="timed steps of each arm")
    parser.add_argument("--samples", type=int, help="of an optimizer step")
    parser.add_argument("--budget", type=int, help="most tokens of a packed row")
    parser.add_argument("--threads", type=int, default=2, help="of each arm, on the CPU")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and samples")
    parser.add_argument("--ablate", action="store_true", help="also ours with each optimisation switched off")
    parser.add_argument("--arms", nargs="+", help="only these besides ours")
    parser.add_argument("--peers", help="interpreter of a virtual environment with TRL, Unsloth, LLaMA-Factory")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.inputs:
        options.shards, options.recommender, options.model = (
            str(options.inputs / name) for name in ("shards", "recommender", "model")
        )
    given = [options.shards, options.recommender, options.model]
    if any(given) and not all(given):
        parser.error("give --shards, --recommender and --model together, or none of them")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = options.device == "cuda"
    options.shape = None if options.model else options.shape or ("7b" if cuda else "small")
    options.rounds = options.rounds or (3 if options.quick else 5)
    options.samples = options.samples or ((64 if options.quick else 128) if cuda else (8 if options.quick else 16))
    # As much as all arms can hold without recomputation; a packed row of a 7B model takes 7.5 GiB a thousand tokens.
    options.budget = options.budget or (4096 if cuda else 2048)
    return options


def prepare(options: argparse.Namespace, scratch: Path) -> Setup:
    """Inputs that are not given are made in `scratch`."""
    device = torch.device(options.device)
    shards, recommender, model = options.shards, options.recommender, options.model
    if not model:
        make_inputs(scratch)
        shards, recommender, model = (str(scratch / name) for name in ("shards", "recommender", "model"))
        write_random_nf4(Path(model), options.shape, scratch / "tokenizer", device)
    elif "quantization_config" not in read_json(Path(model) / "config.json", "a model's config.json"):
        quantize(model, scratch / "model")
        model = str(scratch / "model")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    setup = Setup(
        model=model,
        shards=shards,
        recommender=recommender,
        scratch=str(scratch),
        device=options.device,
        threads=options.threads,
        global_batch=options.samples,
        budget=options.budget,
        rows=1,
        steps=options.rounds + 1,
    )
    mean = statistics.mean(len(sample.tokens) for step in setup.batches() for sample in step)
    fitting = [rows for rows in divisors(options.samples) if rows * mean <= options.budget]
    return Setup.read(json.dumps({**json.loads(setup.write()), "rows": max(fitting)}))


def divisors(number: int) -> list[int]:
    """All divisors, increasing."""
    return [part for part in range(1, number + 1) if number % part == 0]


class Arms:
    """Starts the arms, lets them take turns and keeps what they measured.

    Args:
        setup: the benchmark's.
        peers: interpreter of TRL, Unsloth and LLaMA-Factory.

    Attributes:
        steps: by arm, each timed step's measurements; the warm-up step is left out.
        facts: by arm, what it said when it was ready.
        reasons: by arm, why it did not run.
    """

    def __init__(self, setup: Setup, peers: str) -> None:
        self.setup = setup
        self.steps: dict[str, list[dict[str, Any]]] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.reasons: dict[str, str] = {}
        self._peers = peers
        self._running: dict[str, Worker] = {}

    def measure(self, names: list[str], ablate: bool) -> Iterator[list[str]]:
        """Run the arms; where `ablate`, also the variants of ours that differ from what it chose, and one peer's.

        Yields:
            The arms to come, whenever the others have been timed equally often: after each arm, on a CPU each round.

        Raises:
            SystemExit: what all else is compared with does not run.
        """
        together = self.setup.device == "cpu"
        waiting, running = list(names), []
        while waiting:
            name = waiting.pop(0)
            if self._start(name):
                running.append(name)
                if name == OURS and ablate:
                    chosen = self.facts[OURS]["kernels"]
                    waiting[:0] = [f"{OURS}, {field}={off}" for field, off in OFF.items() if chosen[field] != off]
                if name == TRAINER and ablate:
                    waiting.insert(0, GROUPED)
            if together and waiting:
                continue
            for turn in range(self.setup.steps - 1):
                first = turn % max(1, len(running))
                for each in running[first:] + running[:first]:
                    measured = self._step(each)
                    if measured is not None:
                        self.steps[each].append(measured)
                if together:
                    yield []
            while running:
                self._stop(running.pop())
            if not together and self.steps.get(OURS):
                yield list(waiting)

    def _start(self, name: str) -> bool:
        """Start an arm and let it warm up on one step."""
        say(f"{name}: starting")
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(self.setup.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "DS_ACCELERATOR": self.setup.device,
        }
        if self.setup.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        python = self._peers if name in PEERS else sys.executable
        log = Path(self.setup.scratch) / f"{len(self.facts)}.log"
        worker = Worker(python, [name, self.setup.write()], environment, log)
        self._running[name], self.steps[name] = worker, []
        if not worker.wait_ready():
            self._failed(name)
        alive = self._step(name) is not None
        self.facts[name] = worker.facts
        if not alive:
            self._stop(name)
        return alive

    def _step(self, name: str) -> dict[str, Any] | None:
        worker = self._running[name]
        if worker.reason:
            return None
        measured = worker.step()
        if measured is None:
            self._failed(name)
        else:
            say(f"{name}: {measured['seconds']:.2f} s")
        return measured

    def _failed(self, name: str) -> None:
        """Note why, and show the end of what the arm printed, which is gone with the scratch folder."""
        worker = self._running[name]
        self.reasons[name] = worker.reason
        printed = worker.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        say("\n".join([*printed, f"{name}: does not run here: {worker.reason}"]))
        if name in (MATRIX, OURS):
            raise SystemExit(f"{name} does not run: there is nothing to compare with")

    def _stop(self, name: str) -> None:
        self._running.pop(name).stop()


def say(line: str) -> None:
    """To standard error, so that standard output holds the result alone."""
    print(line, file=sys.stderr, flush=True)


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


def spread(values: list[float]) -> dict[str, float]:
    """Median and range, to four significant digits."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


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


def hardware(device: str, threads: int) -> str:
    """What it ran on."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores"
    told = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in told if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {os.cpu_count()} cores, {threads} threads"


def versions(peers: str | None) -> dict[str, str]:
    """Of what the numbers depend on; peers' own versions where they live elsewhere."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if peers:
        ask = (
            "from importlib.metadata import distributions\n"
            f"print(*(f'{{d.name}}={{d.version}}' for d in distributions() if d.name.lower() in {PACKAGES}))"
        )
        told = subprocess.run([peers, "-c", ask], capture_output=True, text=True).stdout
        found |= dict(item.split("=", 1) for item in told.split())
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


if __name__ == "__main__":
    main()
