"""`llara-dist plan`: what a run will need on hardware that is not at hand."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llara_dist.config import ModelConfig, RunConfig
from llara_dist.console import GIB, say, table
from llara_dist.cost.architecture import PRESETS, Architecture
from llara_dist.cost.hardware import find_gpu
from llara_dist.cost.memory import RunMemory, run_memory
from llara_dist.cost.predict import Cluster, StepTime, predict_step
from llara_dist.cost.recommend import MARGIN, as_json, fewest_recomputed, recommend
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import SampleSizes, Work
from llara_dist.cost.zero import ZeroSettings
from llara_dist.ds_config import read_ds_config
from llara_dist.errors import InputError
from llara_dist.run_options import read_run

ASSUMED = (
    "Counted: weights, optimizer state, saved activations, FLOPs, collectives (held by tests on the CPU). Assumed, and "
    "not validated on GPUs: efficiencies, runtime and allocator overhead, in-flight workspace, links."
)


def plan(
    model: str = "llama-2-7b",
    gpu: str = "h100",
    gpus: list[int] | int = 8,
    gpus_per_node: int = 8,
    run: Path | None = None,
    ds_config: Path | None = None,
    tokens_per_microbatch: int = 0,
    global_batch: int = 0,
    tokens_per_sample: int = SampleSizes.mean,
    longest_sample: int = 0,
    answer_tokens: int = SampleSizes.answer_tokens,
    slots: int = SampleSizes.slots,
    num_items: int = 1682,
    item_dim: int = 64,
    train_samples: int = 0,
    network_gbit_per_s: float = 0.0,
    formulas: bool = False,
) -> dict[str, Any]:
    """Predict memory per GPU, step time and communication, and recommend stage, token budget and recomputation.

    Args:
        model: llama-2-7b, llama-2-13b, llama-2-70b, llama-3-8b, llama-3-70b, or a folder or hub id with a config.json.
        gpu: type, e.g. a100, h100, h200, b200, l40s, rtx-4090.
        gpus: number of GPUs, or several: '[8, 64, 1024]'.
        gpus_per_node: of a full node.
        run: YAML of a run, or the config.json of one; the paper's settings by default.
        ds_config: instead of the run's.
        tokens_per_microbatch: instead of the run's data.max_tokens_per_microbatch.
        global_batch: samples an optimizer step; 0 = the run's, or a full micro-batch on each of more GPUs than that.
        tokens_per_sample: mean length of a hybrid sample (`shards build` prints it).
        longest_sample: longest sample; 0 = 1.4 times the mean.
        answer_tokens: labels of a mean sample.
        slots: behaviour tokens of a mean sample.
        num_items: rows of the item table.
        item_dim: width of the item table.
        train_samples: samples of an epoch, for the hours of all epochs; 0 = not given.
        network_gbit_per_s: of one GPU's share of the network between nodes; 0 = as assumed for its type.
        formulas: print the formulas too.

    Raises:
        InputError: an unknown model or GPU type, or numbers that make no run.
    """
    config = _run(run)
    architecture = _architecture(model, config.model)
    hardware = find_gpu(gpu)
    if network_gbit_per_s > 0:
        hardware = dataclasses.replace(hardware, inter_node=network_gbit_per_s / 8 * 1e9)
    counts = [gpus] if isinstance(gpus, int) else gpus
    numbers = {"gpus_per_node": gpus_per_node, "tokens_per_sample": tokens_per_sample, "num_items": num_items}
    numbers |= {"item_dim": item_dim, "gpus": min(counts, default=0)}
    numbers |= {"answer_tokens": answer_tokens}
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"--{name} {value}: must be at least 1")
    optional = {"slots": slots, "train_samples": train_samples, "network_gbit_per_s": network_gbit_per_s}
    optional |= {"tokens_per_microbatch": tokens_per_microbatch, "global_batch": global_batch}
    for name, value in optional.items():
        if not 0 <= value < math.inf:
            raise InputError(f"--{name} {value}: must not be negative")
    longest = longest_sample or math.ceil(1.4 * tokens_per_sample)
    if longest < tokens_per_sample:
        raise InputError(f"--longest_sample {longest}: shorter than the mean, {tokens_per_sample} tokens")
    samples = SampleSizes(tokens_per_sample, longest, answer_tokens, slots)
    budget = tokens_per_microbatch or config.data.max_tokens_per_microbatch
    if budget < longest:
        raise InputError(f"--tokens_per_microbatch {budget}: less than the longest sample, {longest} tokens")
    zero_path = ds_config or config.deepspeed
    zero = ZeroSettings.of(read_ds_config(zero_path), str(zero_path))
    tuned = TunedModel.of(config, architecture, (num_items, item_dim), _in_bfloat16(config.model), zero.stage)
    target = config.model.memory_target_gib * GIB if config.model.activation_checkpointing == "auto" else None
    setting = _Setting(tuned, zero, samples, budget, target)
    rows = []
    for count in counts:
        cluster = Cluster(hardware, count, gpus_per_node)
        batch = global_batch or config.data.global_batch_samples
        if not global_batch and batch < count:
            batch = count * max(1, budget // samples.mean)
        if batch < count:
            raise InputError(f"--global_batch {batch}: fewer samples than {count} GPUs; some would compute nothing")
        enlarged = not global_batch and batch != config.data.global_batch_samples
        rows.append(_predict(setting, cluster, batch, enlarged, config.data.workers))
    result = {
        "model": model,
        "parameters": architecture.parameters,
        "trained_parameters": tuned.trainable,
        "gpu": hardware.name,
        "stage": setting.zero.stage,
        "tokens_per_microbatch": budget,
        "predictions": [row.as_json(config.data.epochs * train_samples) for row in rows],
        "assumed": ASSUMED,
    }
    _show(result, rows, setting)
    if formulas:
        _show_formulas()
    return result


@dataclass(frozen=True)
class _Setting:
    tuned: TunedModel
    zero: ZeroSettings
    samples: SampleSizes
    budget: int
    target: float | None
    """bytes for which layers are recomputed, 0 = what a GPU has; None = as many as the run says"""


@dataclass(frozen=True)
class _Prediction:
    """What is predicted for one number of GPUs."""

    cluster: Cluster
    memory: RunMemory
    step: StepTime
    recomputed: int
    enlarged: bool
    """whether the global batch was raised above the run's, which has fewer samples than there are GPUs"""
    recommended: dict[str, Any] | None

    @property
    def fits(self) -> bool:
        return self.memory.device_bytes <= self.cluster.hardware.memory_bytes

    def as_json(self, samples: int) -> dict[str, Any]:
        step, memory = self.step, self.memory
        return {
            "gpus": self.cluster.ranks,
            "nodes": self.cluster.nodes,
            "fits": self.fits,
            "device_bytes": memory.device_bytes,
            "device": memory.device,
            "start_bytes": memory.start,
            "host_bytes_per_rank": memory.host_bytes,
            "host": memory.host,
            "step_s": step.seconds,
            "step_parts_s": {name: getattr(step, name) for name in PARTS},
            "microbatches": step.microbatches,
            "recomputed_layers": self.recomputed,
            "global_batch_samples": step.samples,
            "global_batch_enlarged": self.enlarged,
            "sent_bytes_per_rank": step.sent_bytes,
            "collectives": step.collectives,
            "tokens_per_s": step.tokens_per_s,
            "mfu": step.mfu,
            "hours": samples / step.samples * step.seconds / 3600 if samples else None,
            "recommended": self.recommended,
        }


PARTS = ("products", "elementwise", "dequantisation", "launching", "optimizer", "communication")


def _predict(setting: _Setting, cluster: Cluster, batch: int, enlarged: bool, workers: int) -> _Prediction:
    tuned, zero, samples = setting.tuned, setting.zero, setting.samples
    row = samples.largest_row(setting.budget, math.ceil(batch / cluster.ranks), tuned.items)
    if setting.target is not None:
        tuned = _recomputing(tuned, row, zero, cluster, setting.target or (1 - MARGIN) * cluster.hardware.memory_bytes)
    memory = run_memory(tuned, row, zero, cluster.ranks, workers=workers)
    step = predict_step(tuned, zero, cluster, samples, batch, setting.budget)
    stages = {stage: ZeroSettings.of(read_ds_config(Path(f"ds_configs/zero{stage}.json"))) for stage in range(4)}
    found = recommend(tuned, cluster, samples, batch, stages)
    return _Prediction(cluster, memory, step, tuned.recomputed, enlarged, None if found is None else as_json(found))


def _recomputing(tuned: TunedModel, row: Work, zero: ZeroSettings, cluster: Cluster, room: float) -> TunedModel:
    """What `model.activation_checkpointing=auto` will come to: as few layers as fit, or all."""
    layers = tuned.architecture.layers

    def held(count: int) -> TunedModel:
        return dataclasses.replace(tuned, recompute=count)

    fewest = fewest_recomputed(layers, lambda n: run_memory(held(n), row, zero, cluster.ranks).device_bytes, room)
    return held(layers if fewest is None else fewest)


def _run(path: Path | None) -> RunConfig:
    if path is None:
        return RunConfig(deepspeed=Path("ds_configs/zero1.json"))
    try:
        return read_run(path)
    except InputError as error:
        raise InputError(f"--run {error}") from None


def _in_bfloat16(model: ModelConfig) -> bool:
    """What `model.llama.compute_dtype` says on a GPU with bfloat16, which all of `GPUS` are."""
    return model.compute_dtype == "bfloat16" or (model.compute_dtype == "auto" and model.bits != 32)


def _architecture(model: str, held: ModelConfig) -> Architecture:
    if model.lower() in PRESETS:
        return PRESETS[model.lower()]
    if not Path(model).exists() and "/" not in model:
        known = ", ".join(PRESETS)
        raise InputError(f"--model {model}: unknown; known are {known}, or a folder or hub id with a config.json")
    from llara_dist.model.llama import read_llama_config

    return Architecture.of(read_llama_config(dataclasses.replace(held, path=model)))


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def _gpus(row: _Prediction) -> str:
    return f"{row.cluster.ranks} GPU{'s' if row.cluster.ranks > 1 else ''}"


def _show(result: dict[str, Any], rows: list[_Prediction], setting: _Setting) -> None:
    """Tables: memory by kind, time by part, and the recommendation, a column or row for each number of GPUs."""
    head = [_gpus(row) for row in rows]
    title = f"{result['model']} on {result['gpu']}, ZeRO-{setting.zero.stage}, {setting.budget} tokens a micro-batch"
    kinds = rows[0].memory.device
    lines = [[kind, *[_gib(row.memory.device[kind]) for row in rows]] for kind in kinds]
    lines.append(["at the peak of a step", *[_gib(sum(row.memory.device.values())) for row in rows]])
    lines.append(["while DeepSpeed starts", *[_gib(row.memory.start) for row in rows]])
    lines.append(["fits", *["yes" if row.fits else "NO" for row in rows]])
    lines.append(["host, a rank", *[_gib(row.memory.host_bytes) for row in rows]])
    table(f"{title}: GiB a GPU", ["kind", *head], lines)
    lines = [[part, *[f"{getattr(row.step, part):.4f}" for row in rows]] for part in PARTS]
    lines.append(["step", *[f"{row.step.seconds:.4f}" for row in rows]])
    table("seconds of an optimizer step", ["part", *head], lines)
    facts: list[tuple[str, list[str]]] = [
        ("samples a step", [str(row.step.samples) for row in rows]),
        ("micro-batches", [str(row.step.microbatches) for row in rows]),
        ("layers recomputed", [str(row.recomputed) for row in rows]),
        ("MB sent a GPU and step", [f"{row.step.sent_bytes / 1e6:.1f}" for row in rows]),
        ("collectives a step", [str(row.step.collectives) for row in rows]),
        ("tokens/s", [f"{row.step.tokens_per_s:,.0f}" for row in rows]),
        ("MFU", [f"{row.step.mfu:.1%}" for row in rows]),
    ]
    hours = [prediction["hours"] for prediction in result["predictions"]]
    if hours[0] is not None:
        facts.append(("hours, all epochs", [f"{value:.2f}" for value in hours]))
    table("communication and speed", ["", *head], [[name, *values] for name, values in facts])
    for row in rows:
        if row.enlarged:
            say(f"{_gpus(row)}: more than the run's global batch; predicted for {row.step.samples} samples a step")
        if row.recommended is None:
            whole = row.memory.start > row.cluster.hardware.memory_bytes
            why = "DeepSpeed places the whole model on each GPU before it partitions" if whole else "no stage or budget"
            say(f"{_gpus(row)}: nothing fits ({why}); take GPUs with more memory, or shorter samples")
            continue
        chosen = dict(row.recommended)
        reasons, predicted = chosen.pop("reasons"), chosen.pop("predicted")
        say(f"{_gpus(row)}, recommended: {json.dumps(chosen)[1:-1]}")
        used = _gib(predicted["device_bytes"])
        say(f"  - predicted: {predicted['tokens_per_s']:,.0f} tokens/s, {used} GiB a GPU")
        for reason in reasons:
            say(f"  - {reason}")
    say(ASSUMED)


def _show_formulas() -> None:
    """The rooms' own statements: each formula stands beside the code that computes it."""
    from llara_dist.cost import activations, communication, flops, memory, predict

    for room in (memory, activations, flops, communication, predict):
        say("")
        say(room.__doc__ or "")
