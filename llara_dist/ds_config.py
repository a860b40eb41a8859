"""What a ds_config may say: ZeRO, communication and precision; everything else is the run's own configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llara_dist.errors import InputError

CHECKOUT = Path(__file__).parents[1]
"""Where ds_configs/ lies; the package is installed from a checkout."""

OURS = {
    "train_batch_size": "data.global_batch_samples",
    "train_micro_batch_size_per_gpu": "data.max_tokens_per_microbatch",
    "gradient_accumulation_steps": "data.max_tokens_per_microbatch",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.warmup_fraction",
    "fp16": "model.compute_dtype",
    "bfloat16": "model.compute_dtype",
    "amp": "model.compute_dtype",
    "torch_autocast": "model.compute_dtype",
}
"""ds_config keys that would say a second time, and differently, what the run's configuration says."""


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read a ds_config and refuse what it may not say: it holds ZeRO, communication and precision only.

    Raises:
        InputError: missing, not JSON, or a key that belongs to the run's configuration or is known to corrupt it.
    """
    if not path.is_absolute() and not path.exists() and (CHECKOUT / path).is_file():
        path = CHECKOUT / path
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        problem = "not found; see ds_configs/" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(f"{path}: ds_config {problem}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: a ds_config is a JSON object")
    for section in ("zero_optimization", "data_types", "bf16"):
        if not isinstance(config.get(section, {}), dict):
            raise InputError(f"{path}: {section} must be an object, found {config[section]!r}")
    for key, ours in OURS.items():
        if key in config:
            raise InputError(f"{path}: {key} may not be set in a ds_config; it is set by {ours} of the run: remove it")
    if config.get("bf16", {}).get("enabled"):
        raise InputError(
            f"{path}: bf16.enabled casts LoRA and projector weights to bfloat16; they train in float32 and matrix "
            "products run in model.compute_dtype: remove it"
        )
    zero = config.get("zero_optimization", {})
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(key):
            raise InputError(f"{path}: zero_optimization.{key} would quantise the packed 4-bit bytes again: remove it")
    if config.get("data_types", {}).get("grad_accum_dtype", "fp32") != "fp32":
        raise InputError(f"{path}: data_types.grad_accum_dtype must be fp32: gradients are accumulated in float32")
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise InputError(f"{path}: zero_optimization.stage={zero['stage']!r} is not 0, 1, 2 or 3")
    return config


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage that a ds_config asks for; 0 where it says nothing."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))
