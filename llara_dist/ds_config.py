"""What a ds_config may say: ZeRO, communication and precision; everything else is the run's own configuration."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from llara_dist.errors import Finding, FindingsError, InputError

CHECKOUT = Path(__file__).parents[1]
"""Where ds_configs/ lies; the package is installed from a checkout."""

OURS = {
    "train_batch_size": "data.global_batch_samples",
    "train_micro_batch_size_per_gpu": "data.max_tokens_per_microbatch",
    "gradient_accumulation_steps": "data.max_tokens_per_microbatch",
    "managed_gradient_accumulation": "data.max_tokens_per_microbatch",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.warmup_fraction",
    "fp16": "model.compute_dtype",
    "bfloat16": "model.compute_dtype",
    "amp": "model.compute_dtype",
    "torch_autocast": "model.compute_dtype",
    "activation_checkpointing": "model.activation_checkpointing",
}
"""Keys that would say a second time, and differently, what the run's configuration says."""

_GRADIENTS = "gradients are averaged over the ranks in float32"
_OTHER_WEIGHTS = "it would change the weights or how they are held behind the run's back"
_OTHER_SAMPLES = "it would choose other samples than the run's plan"
_OTHER_BATCH = "it would change the global batch, which belongs to the plan"
_OTHER_PARALLELISM = "the run is data-parallel; this would split the model in another way"

REFUSED = {
    "autotuning": _OTHER_BATCH,
    "elasticity": _OTHER_BATCH,
    "data_efficiency": _OTHER_SAMPLES,
    "curriculum_learning": _OTHER_SAMPLES,
    "progressive_layer_drop": "it would drop layers while training",
    "eigenvalue": _OTHER_WEIGHTS,
    "quantize_training": _OTHER_WEIGHTS,
    "compression_training": _OTHER_WEIGHTS,
    "weight_quantization": _OTHER_WEIGHTS,
    "hybrid_engine": _OTHER_WEIGHTS,
    "sparse_attention": "attention is chosen by model.attention",
    "sparse_gradients": _GRADIENTS,
    "pipeline": _OTHER_PARALLELISM,
    "tensor_parallel": _OTHER_PARALLELISM,
    "expert_parallel": _OTHER_PARALLELISM,
    "sequence_parallel_size": _OTHER_PARALLELISM,
    "compile": "the run compiles nothing through DeepSpeed",
    "nebula": "checkpoints are written by the run itself",
    "datastates_ckpt": "checkpoints are written by the run itself",
    "checkpoint": "checkpoints are written by the run itself",
}
"""Features that would fight the run; a section that says "enabled": false is let pass."""

FIXED: dict[str, tuple[Any, str]] = {
    "communication_data_type": ("fp32", _GRADIENTS),
    "seq_parallel_communication_data_type": ("fp32", _GRADIENTS),
    "gradient_allreduce_op": ("mean", _GRADIENTS),
    "prescale_gradients": (False, _GRADIENTS),
    "gradient_predivide_factor": (1.0, _GRADIENTS),
    "zero_allow_untested_optimizer": (True, "AdamW is torch's own"),
    "zero_force_ds_cpu_optimizer": (False, "AdamW is torch's own"),
    "data_types.grad_accum_dtype": ("fp32", "gradients are accumulated in float32"),
    "data_types.param_dtype": ("fp32", "LoRA and projector train in float32"),
    "data_types.buffer_dtype": ("fp32", "the item table is float32"),
    "zero_optimization.compute_grad_norm": (True, "the gradient norm is logged and clipped"),
    "zero_optimization.zero_quantized_gradients": (False, _GRADIENTS),
    "zero_optimization.zero_quantized_weights": (False, "it would quantise the packed 4-bit bytes again"),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, "it would quantise the packed 4-bit bytes again"),
}
"""Keys that have one right value, and why."""

HARMLESS = {
    "aio",
    "bf16",
    "comet",
    "comms_logger",
    "csv_monitor",
    "data_types",
    "dataloader_drop_last",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "log_level",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "timers",
    "use_node_local_storage",
    "vocabulary_size",
    "wall_clock_breakdown",
    "wandb",
    "zero_optimization",
}
"""Keys at the top that say how ZeRO works or what DeepSpeed prints, and nothing about what is trained."""

KNOWN = HARMLESS | OURS.keys() | REFUSED.keys() | {key for key in FIXED if "." not in key}

CHECK = "ds_config"


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read a ds_config and refuse what it may not say: it holds ZeRO, communication and precision only.

    Raises:
        InputError: missing or not JSON; or all the keys that belong to the run's configuration or would corrupt it.
    """
    ds_config = load_ds_config(path)
    findings = [finding for finding in check_ds_config(ds_config, str(path)) if finding.severity == "error"]
    if findings:
        raise FindingsError(findings, str(path))
    return ds_config


def load_ds_config(path: Path) -> dict[str, Any]:
    """The JSON object in a file, unchecked; a relative path is also looked for in the checkout.

    Raises:
        InputError: missing, not JSON, no object, or a key given twice.
    """
    if not path.is_absolute() and not path.exists() and (CHECKOUT / path).is_file():
        path = CHECKOUT / path
    try:
        config = json.loads(path.read_text(), object_pairs_hook=_without_repeats)
    except OSError as error:
        problem = "not found; see ds_configs/" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(f"{path}: ds_config {problem}") from None
    except (KeyError, ValueError) as error:
        what = f"{error.args[0]!r} is given twice" if isinstance(error, KeyError) else f"not JSON ({error})"
        raise InputError(f"{path}: {what}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: a ds_config is a JSON object")
    return config


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise KeyError(key)
        found[key] = value
    return found


def check_ds_config(ds_config: dict[str, Any], shown: str) -> list[Finding]:
    """Everything that a ds_config may not say, and what is worth a warning; a pure function.

    Args:
        ds_config: as loaded.
        shown: its path, for messages.
    """
    return [
        Finding(CHECK, f"{shown}: {found}", remedy, severity)
        for rules in (_sections, _top, _fixed, _zero, _autos)
        for found, remedy, severity in rules(ds_config)
    ]


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage that a ds_config asks for; 0 where it says nothing."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def nearest(name: str, known: set[str]) -> str:
    """A question that names the most similar known name, or nothing."""
    close = difflib.get_close_matches(name, sorted(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


_Rule = Iterator[tuple[str, str, Literal["error", "warning"]]]
"""found, remedy, severity"""


def _section(ds_config: dict[str, Any], name: str) -> dict[str, Any]:
    section = ds_config.get(name, {})
    return section if isinstance(section, dict) else {}


def _sections(ds_config: dict[str, Any]) -> _Rule:
    for name in ("zero_optimization", "data_types", "bf16"):
        if not isinstance(ds_config.get(name, {}), dict):
            yield f"{name} must be an object, found {ds_config[name]!r}", "see ds_configs/", "error"


def _top(ds_config: dict[str, Any]) -> _Rule:
    for key, value in ds_config.items():
        off = value is False or (isinstance(value, dict) and value.get("enabled") is False)
        if key in OURS:
            yield f"{key} may not be set in a ds_config", f"{OURS[key]} of the run says it: remove it", "error"
        elif key in REFUSED and not off:
            yield f"{key} may not be set: {REFUSED[key]}", "remove it", "error"
        elif key not in KNOWN:
            yield f"{key} is no key that DeepSpeed is known to read{nearest(key, KNOWN)}", "remove it", "warning"
    if _section(ds_config, "bf16").get("enabled"):
        yield (
            "bf16.enabled casts LoRA and projector weights to bfloat16; they train in float32 and matrix products run "
            "in model.compute_dtype",
            "remove it",
            "error",
        )


def _fixed(ds_config: dict[str, Any]) -> _Rule:
    for name, (right, why) in FIXED.items():
        section, _, key = name.rpartition(".")
        within = _section(ds_config, section) if section else ds_config
        if within.get(key, right) not in (right, None):
            right_json = json.dumps(right).strip('"')
            yield f"{name} must be {right_json}: {why}; found {within[key]!r}", "remove it", "error"


def _zero(ds_config: dict[str, Any]) -> _Rule:
    zero = _section(ds_config, "zero_optimization")
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        yield f"zero_optimization.stage={stage!r} is not 0, 1, 2 or 3", "see ds_configs/", "error"
    for key in ("offload_optimizer", "offload_param"):
        device = _section(zero, key).get("device", "none")
        if device == "nvme":
            yield (
                f"zero_optimization.{key}.device=nvme: checkpoints read AdamW's state from memory",
                "use cpu or remove it",
                "error",
            )
        elif device == "cpu" and key == "offload_param":
            yield (
                "zero_optimization.offload_param: never tried with packed 4-bit weights, whose quantisation state "
                "DeepSpeed neither offloads nor brings back",
                "remove it; offload_optimizer is tested",
                "error",
            )
    for key, instead in (
        ("cpu_offload", "write offload_optimizer instead"),
        ("cpu_offload_param", "remove it"),
        ("zenflow", "remove it"),
    ):
        if zero.get(key):
            yield f"zero_optimization.{key} replaces the optimizer's state that checkpoints read", instead, "error"
    offload = zero.get("offload_optimizer")
    if isinstance(offload, dict) and (offload.get("super_offload") or offload.get("ratio", 1.0) != 1.0):
        yield (
            "zero_optimization.offload_optimizer.super_offload and .ratio replace the optimizer that is handed in, and "
            "whose state checkpoints read",
            "remove them",
            "error",
        )
    if _at_least(zero.get("zero_hpz_partition_size", 1), 2):
        yield (
            "zero_optimization.zero_hpz_partition_size: never tried with packed 4-bit weights",
            "compare the first losses with a run without it",
            "warning",
        )
    threshold = zero.get("stage3_param_persistence_threshold", zero.get("param_persistence_threshold"))
    if stage == 3 and threshold is not None and not _at_least(threshold, 100_000):
        yield (
            f"zero_optimization.stage3_param_persistence_threshold={threshold!r} shards LoRA matrices for nothing, and "
            "gathers them again in every layer",
            "set 100000 or more",
            "warning",
        )
    if stage in (1, 2) and zero.get("overlap_comm") is True and zero.get("contiguous_gradients", True):
        yield (
            "zero_optimization.overlap_comm with contiguous_gradients: gradients that are NaN or wrong have been "
            "reported of DeepSpeed's stages 1 and 2",
            "set overlap_comm to false",
            "warning",
        )


def _at_least(value: Any, least: int) -> bool:
    return isinstance(value, int | float) and value >= least


def _autos(value: Any, where: str = "") -> _Rule:
    if isinstance(value, dict):
        for key, inner in value.items():
            if where or key not in OURS:
                yield from _autos(inner, f"{where}.{key}" if where else key)
    elif value == "auto":
        yield f'{where}="auto" is filled in by transformers\' Trainer, which is not used here', "give a value", "error"
