"""DeepSpeed: what a ds_config may say, initialisation, and one optimizer step over uneven micro-batches."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llara_dist import distributed
from llara_dist.config import OptimizerConfig
from llara_dist.errors import InputError
from llara_dist.hashing import hash64, text_seed
from llara_dist.model.hybrid import HybridLlama
from llara_dist.stream.loader import Step

CHECKOUT = Path(__file__).parents[2]
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


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave.

    Attributes:
        loss: summed answer cross-entropy ÷ answer tokens of the global step, in nats.
        grad_norm: global gradient norm before clipping; None where DeepSpeed does not report it (stage 0).
    """

    loss: float
    grad_norm: float | None


class Engine:
    """A HybridLlama under DeepSpeed.

    Args:
        model: every rank holds the same initial parameters.
        ds_config: as `read_ds_config` returns it.
        optimizer: rates, decay, clipping.
        device: of this rank.
        world: where this process stands.
        seed: of the dropout generator.
    """

    def __init__(
        self,
        model: HybridLlama,
        ds_config: dict[str, Any],
        optimizer: OptimizerConfig,
        device: torch.device,
        world: distributed.World,
        seed: int,
    ) -> None:
        import deepspeed
        from pydantic import ValidationError

        # DeepSpeed's own calls, of which it says nothing that a user could act on.
        warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)
        self.model = model
        self.device = device
        self.world = world
        self.seed = seed
        self.parameters = {**model.lora_parameters(), **model.projector_parameters()}
        groups: list[dict[str, Any]] = [
            {"params": list(model.lora_parameters().values()), "weight_decay": optimizer.lora_weight_decay},
            {"params": list(model.projector_parameters().values()), "weight_decay": optimizer.projector_weight_decay},
        ]
        self._decay = [group["weight_decay"] for group in groups]
        adamw = torch.optim.AdamW(
            groups, lr=optimizer.lora_lr, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.epsilon
        )
        self._engine: Any
        self._optimizer: Any
        try:
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=adamw,
                config={
                    "steps_per_print": 1 << 60,
                    "data_types": {"grad_accum_dtype": "fp32"},
                    **ds_config,
                    "train_micro_batch_size_per_gpu": 1,
                    "gradient_accumulation_steps": 1,
                    "gradient_clipping": optimizer.max_grad_norm,
                    "zero_allow_untested_optimizer": True,
                    "zero_force_ds_cpu_optimizer": False,
                },
                dist_init_required=False,
            )
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise InputError(f"ds_config: zero_optimization.{field}: {first['msg']}") from None
        self._engine.train()

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer; `optimizer_state` reads and writes its moments."""
        return self._optimizer

    def train_step(self, step: Step, lora_lr: float, projector_lr: float) -> StepResult:
        """One optimizer step: every micro-batch forward and backward, one reduction, one update.

        A micro-batch's loss is its summed answer loss × world size ÷ answer tokens of the global step: DeepSpeed
        averages gradients over ranks, which cancels the world size.

        Args:
            step: this rank's micro-batches; equally many on every rank.
            lora_lr: rate of the adapters.
            projector_lr: rate of the projector; 0 holds it exactly still (decay is off too).

        Raises:
            FloatingPointError: the loss is not finite, on every rank, before anything is updated.
        """
        for group, rate, decay in zip(self._optimizer.param_groups, (lora_lr, projector_lr), self._decay, strict=True):
            group["lr"], group["weight_decay"] = rate, decay if rate > 0 else 0.0
        summed = torch.zeros((), dtype=torch.float64, device=self.device)
        total = math.nan
        last = len(step.microbatches) - 1
        for index, batch in enumerate(step.microbatches):
            self._reseed(step.index, index)
            loss = self._engine(batch.to(self.device))
            summed += loss.detach()
            if index == last:
                # Before the update, and the same on every rank: one that is not finite makes the sum so.
                total = distributed.all_sum([float(summed)], self.device)[0]
                if not math.isfinite(total):
                    keys = ", ".join(str(key) for key in step.keys)
                    raise FloatingPointError(
                        f"step {step.index}: the loss is {total}; nothing was updated or saved. Sample keys: {keys}. "
                        "Lower optimizer.lora_lr and projector_lr, or look at these samples with `shards inspect`"
                    )
            self._engine.set_gradient_accumulation_boundary(index == last)
            self._engine.backward(loss * (self.world.size / step.answer_tokens))
            self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return StepResult(loss=total / step.answer_tokens, grad_norm=None if norm is None else float(norm))

    def _reseed(self, step: int, microbatch: int) -> None:
        """Dropout is a function of (seed, step, rank, micro-batch), so that a resumed step repeats exactly."""
        torch.manual_seed(int(hash64(text_seed("dropout"), self.seed, step, self.world.rank, microbatch)) >> 1)
