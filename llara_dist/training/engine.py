"""DeepSpeed: initialisation, and one optimizer step over uneven micro-batches."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from llara_dist import distributed
from llara_dist.config import OptimizerConfig
from llara_dist.errors import InputError
from llara_dist.hashing import hash64, text_seed
from llara_dist.model.hybrid import HybridLlama
from llara_dist.stream.loader import Step


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
