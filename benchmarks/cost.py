"""What the cost room predicts against what real training on CPU ranks does: memory, communication, time.

    PYTHONPATH=. python benchmarks/cost.py [--out benchmarks/results/cost.json] [--runs FOLDER]

Real runs through `llara_dist.training` (NF4, LoRA, projector, DeepSpeed with gloo) on one and two ranks, ZeRO 0 to 3
and offload; on one rank also with recomputed activations and in a second shape. On rank 0 are measured, after the
first steps:

- at rest: bytes of every tensor that lives between two steps, by walking the interpreter's objects;
- peak: what the CPU allocator served at the highest point of a step, above its level before, from PyTorch's profiler;
- traffic: every collective's bytes;
- time: CPU seconds of the rank's process (other work on the cores does not count, nor does waiting), the median of
  other steps than those observed. One efficiency is fitted to one shape on one rank, and predicts the others. Beside
  that a prediction from this machine's measured peaks alone.

No GPU took part. The published GPU speeds at the end are other people's figures for other software and set-ups.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import versions
from llara_dist import distributed
from llara_dist.config import LoraConfig, RunConfig
from llara_dist.cost.activations import activation_bytes
from llara_dist.cost.architecture import PRESETS, Architecture
from llara_dist.cost.collectives import CollectiveCounter
from llara_dist.cost.communication import step_traffic
from llara_dist.cost.flops import step_flops
from llara_dist.cost.hardware import GPUS, measure_cpu
from llara_dist.cost.memory import frozen_bytes, trained_bytes
from llara_dist.cost.predict import Cluster, Efficiency, compute_seconds, predict_step
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import SampleSizes, Work
from llara_dist.cost.zero import ZeroSettings
from llara_dist.ds_config import read_ds_config
from llara_dist.model.llama import read_llama_config
from tests.distributed.ranks import run_ranks
from tests.distributed.training import join
from tests.models import write_shape
from tests.runs import make_inputs, run_config

LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")
SHAPES = {
    "small": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4},
    "wide": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4},
}
CASES = {
    1: [
        *[("small", stage, recompute) for stage in ("zero0", "zero3") for recompute in (False, True)],
        *[("small", stage, False) for stage in ("zero1", "zero2", "zero3_offload")],
        *[("wide", "zero0", recompute) for recompute in (False, True)],
        ("wide", "zero1", False),
    ],
    2: [("small", stage, False) for stage in ("zero0", "zero1", "zero2", "zero3", "zero3_offload")],
}
"""by number of ranks: shape, ds_config, whether activations are recomputed"""
STEPS = 9
OBSERVED = (3, 4)
"""steps whose memory and collectives are observed, which slows them; the later ones are timed"""
BUCKET = 500_000
"""reduce_bucket_size instead of the 50 million of ds_configs/, whose 200 MB would hide all else in such small models"""

ANCHORS = (
    # name, GPU, model, samples x length, rank, bits, recomputation, tokens/s as published
    ("LLaMA-Factory, 4-bit", "a100", "llama-2-7b", 4, 1024, 8, 4, True, 2415),
    ("LLaMA-Factory with Unsloth, 4-bit", "a100", "llama-2-7b", 4, 1024, 8, 4, True, 3726),
    ("Unsloth, 16-bit", "a100", "llama-2-7b", 4, 1024, 8, 16, True, 4007),
    ("NeMo AutoModel, bf16", "h100", "llama-3-8b", 2, 4096, 8, 16, False, 12473),
    ("torchtune QLoRA, compiled", "rtx-4090", "llama-3-8b", 2, 2048, 8, 4, True, 2413),
)


def main() -> None:
    """Measure, compare and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=Path, help="keep the runs here; what was observed there is not measured again")
    options = parser.parse_args()
    cpu = measure_cpu()
    with tempfile.TemporaryDirectory() as name:
        cases = measure_all(options.runs or Path(name))
    fitted = fit(next(case for case in cases if case["name"] == "small-zero0-1"), cpu)
    for case in cases:
        case["time"] |= predict_times(case, cpu, fitted)
    result = {
        "hardware": f"{os.cpu_count()} shared {platform.machine()} CPU cores, one thread a rank, no GPU",
        "versions": versions(LIBRARIES),
        "measured_peaks": {"flops": cpu.flops, "memory_bytes_per_s": cpu.memory_bandwidth},
        "fitted_on_small_zero0_1": dataclasses.asdict(fitted),
        "worst_relative_error": worst(cases),
        "cases": [{k: v for k, v in case.items() if k not in ("model", "row", "zero")} for case in cases],
        "published_elsewhere": [anchor(*values) for values in ANCHORS],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def measure_all(folder: Path) -> list[dict[str, Any]]:
    """Train every case, and put prediction beside measurement."""
    inputs = folder / "inputs"
    if not inputs.exists():
        inputs.mkdir(parents=True)
        make_inputs(inputs)
        for shape, sizes in SHAPES.items():
            write_shape(folder / shape, vocab_size=450, num_attention_heads=8, num_key_value_heads=4, **sizes)
            for path in (inputs / "llm").glob("tokenizer*"):
                (folder / shape / path.name).write_bytes(path.read_bytes())
    cases = []
    for ranks in (1, 2):
        configs = {}
        for shape, stage, recompute in CASES[ranks]:
            name = f"{shape}-{stage}{'-recomputed' if recompute else ''}-{ranks}"
            configs[name] = case_config(inputs, folder, shape, stage, recompute, name)
        missing = [config for config in configs.values() if not (config.out / "observed.json").exists()]
        if missing:
            run_ranks(observe, ranks, folder / f"ranks-{ranks}", missing, timeout_s=3000)
        cases += [compare(name, config, ranks) for name, config in configs.items()]
    return cases


def case_config(inputs: Path, folder: Path, shape: str, stage: str, recompute: bool, name: str) -> RunConfig:
    """A run of a shape and stage, dropout on, with a small reduction bucket."""
    data = {"max_tokens_per_microbatch": 1200, "global_batch_samples": 14}
    config = run_config(inputs, folder / name, stage, max_steps=STEPS, **data)
    ds_config = json.loads(config.deepspeed.read_text())
    ds_config["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(ds_config))
    model = dataclasses.replace(config.model, path=str(folder / shape), activation_checkpointing=recompute)
    return dataclasses.replace(config, model=model, lora=LoraConfig(), deepspeed=path)


def observe(configs: list[RunConfig]) -> None:
    """On every rank: train each run and write what rank 0 saw."""
    from llara_dist.training.preflight.examine import open_inputs
    from llara_dist.training.run import open_run

    world, device = join()
    for config in configs:
        before = living_bytes()
        run = open_run(config, open_inputs(config, world), world, device)
        rest: list[int] = []
        observed: list[dict[str, Any]] = []
        timed: list[dict[str, Any]] = []
        for step in run.loader:
            work = vars(Work.of(step.microbatches))
            largest = vars(max((Work.of([batch]) for batch in step.microbatches), key=lambda work: work.tokens))
            row = {"microbatches": len(step.microbatches), "work": work, "largest": largest}
            started = time.process_time()
            if step.index in OBSERVED:
                with CollectiveCounter() as counter:
                    row["peak"] = step_peak(run, step)
                row["sent"] = {k: v for k, v in counter.traffic.bytes.items() if v > 100}
                observed.append(row)
                rest.append(living_bytes() - before)
            else:
                run.engine.train_step(step, *run.rates(step.index))
                row["seconds"] = time.process_time() - started
                if step.index > max(OBSERVED):
                    timed.append(row)
        if world.is_main:
            text = json.dumps({"rest": max(rest), "observed": observed, "timed": timed})
            (config.out / "observed.json").write_text(text)
        del run
        gc.collect()
    distributed.shut_down()


def living_bytes() -> int:
    """Bytes of the storages of all tensors that the interpreter holds."""
    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) or isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            state = getattr(thing, "quant_state", None)
            for held in () if state is None else (state.absmax, state.code, state.state2.absmax, state.state2.code):
                storages[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    return sum(storages.values())


def step_peak(run: Any, step: Any) -> int:
    """Most bytes that PyTorch's CPU allocator served during a step, above its level at the beginning."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run.engine.train_step(step, *run.rates(step.index))
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def compare(name: str, config: RunConfig, ranks: int) -> dict[str, Any]:
    """Prediction beside measurement for one case."""
    found = json.loads((config.out / "observed.json").read_text())
    architecture = Architecture.of(read_llama_config(config.model))
    model = TunedModel.of(config, architecture, (40, 16), bfloat16=False)
    zero = ZeroSettings.of(read_ds_config(config.deepspeed))
    frozen = frozen_bytes(model, zero if zero.stage == 3 else ZeroSettings(), ranks)
    trained, offloaded = trained_bytes(model, zero, ranks)
    # Between steps nothing is gathered; gradients and buffers live on under stage 3 alone. The host is the device here.
    fleeting = 0 if zero.stage == 3 else trained["gradients"] + trained["communication"]
    gathered = frozen.pop("gathered weights", 0)
    rest = sum(frozen.values()) + sum(trained.values()) - fleeting + offloaded + 4 * model.items * model.item_dim
    largest = max((Work(**row["largest"]) for row in found["observed"]), key=lambda work: work.tokens)
    activations = activation_bytes(model, largest, "cpu")
    peak = activations.total + activations.workspace + fleeting + gathered
    sent = [step_traffic(model, zero, ranks, row["microbatches"]).bytes for row in found["observed"]]
    return {
        "name": name,
        "model": model,
        "zero": zero,
        "ranks": ranks,
        "rest_bytes": pair(rest, found["rest"]),
        "step_peak_bytes": pair(peak, max(row["peak"] for row in found["observed"])),
        "sent_bytes": pair(
            sum(sum(counts.values()) for counts in sent),
            sum(sum(row["sent"].values()) for row in found["observed"]) if ranks > 1 else 0,
        ),
        "time": {"measured_s": statistics.median(row["seconds"] for row in found["timed"])},
        "row": found["timed"],
    }


def pair(predicted: float, measured: float) -> dict[str, float]:
    """With the relative error; 0 where there is nothing of either."""
    error = predicted / measured - 1 if measured else float(predicted != 0)
    return {"predicted": predicted, "measured": measured, "relative_error": round(error, 4)}


def fit(case: dict[str, Any], cpu: Any) -> Efficiency:
    """One factor on both peaks, so that the case's median step is met."""
    predicted = seconds_of(case, cpu, Efficiency(1.0, 1.0, 1.0))
    factor = predicted / case["time"]["measured_s"]
    return Efficiency(factor, factor, factor)


def seconds_of(case: dict[str, Any], cpu: Any, efficiency: Efficiency) -> float:
    """Median of the predicted steps, from the real sizes of their micro-batches."""
    times = []
    for row in case["row"]:
        count = row["microbatches"]
        mean = Work(**{name: value // count for name, value in row["work"].items()})
        cluster = Cluster(cpu, case["ranks"], case["ranks"])
        parts = compute_seconds(case["model"], case["zero"], cluster, mean, count, efficiency)
        traffic = step_traffic(case["model"], case["zero"], case["ranks"], count)
        link = cpu.intra_node * efficiency.links
        times.append(sum(parts.values()) + traffic.sent(case["ranks"]) / link)
    return statistics.median(times)


def predict_times(case: dict[str, Any], cpu: Any, fitted: Efficiency) -> dict[str, float]:
    """From the fitted efficiency, and from the measured peaks alone."""
    measured = case["time"]["measured_s"]
    calibrated, peaks = seconds_of(case, cpu, fitted), seconds_of(case, cpu, Efficiency(1.0, 1.0, 1.0))
    flops = statistics.median(step_flops(case["model"], Work(**row["work"])).model for row in case["row"])
    return {
        "predicted_s": calibrated,
        "relative_error": round(calibrated / measured - 1, 4),
        "at_measured_peaks_s": peaks,
        "mfu": flops / measured / cpu.flops,
    }


def worst(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Largest error of each quantity; of time over the cases that were not fitted."""
    names = ("rest_bytes", "step_peak_bytes", "sent_bytes")
    found = {name: max(abs(case[name]["relative_error"]) for case in cases) for name in names}
    others = [case for case in cases if case["name"] != "small-zero0-1"]
    found["time_one_rank"] = max(abs(case["time"]["relative_error"]) for case in others if case["ranks"] == 1)
    found["time_two_ranks"] = max(abs(case["time"]["relative_error"]) for case in others if case["ranks"] == 2)
    return found


def anchor(
    name: str, gpu: str, preset: str, rows: int, length: int, rank: int, bits: Any, recompute: bool, published: float
) -> dict[str, Any]:
    """A published speed beside the prediction with the default efficiencies; all positions are labels there."""
    architecture = PRESETS[preset]
    model = TunedModel(architecture, rank=rank, dropout=0.0, bits=bits, recompute=recompute)
    samples = SampleSizes(mean=length, longest=length, answer_tokens=length, slots=0)
    cluster = Cluster(GPUS[gpu], 1)
    step = predict_step(model, ZeroSettings(), cluster, samples, rows, rows * length)
    return {
        "system": name,
        "gpu": GPUS[gpu].name,
        "model": preset,
        "recomputation_assumed": recompute,
        "predicted_tokens_per_s": round(step.tokens_per_s),
        "published_tokens_per_s": published,
        "predicted_over_published": round(step.tokens_per_s / published, 2),
        "note": "others' figure, other software; no measurement of ours",
    }


if __name__ == "__main__":
    main()
