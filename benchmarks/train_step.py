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
  does not run says why. LLaMA-Factory wants an environment, and so a run, of its own (benchmarks/peers.txt).

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
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.arms.inputs import SHAPES, make_inputs, write_random_nf4
from benchmarks.arms.processes import Arms
from benchmarks.arms.report import check_losses, report, table
from benchmarks.arms.setup import Setup
from benchmarks.arms.worker import MATRIX, OURS, PEERS, PUBLISHED, TRAINER
from benchmarks.record import machine, peers_versions
from llara_dist.cost.work import Work
from llara_dist.integrity import json_text, read_json, write_json
from llara_dist.model.quantize import quantize
from llara_dist.stream.batch import collate


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
        ran_on = machine(setup.device, setup.threads)
        if options.peers:
            ran_on["versions"] |= peers_versions(options.peers)
        result: dict[str, Any] = {}
        for to_come in arms.measure(names, options.ablate):
            result = {
                "what": "benchmarks/train_step.py",
                **ran_on,
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


if __name__ == "__main__":
    main()
