"""DeepSpeed: initialisation, and one optimizer step over uneven micro-batches."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llara_dist import distributed
from llara_dist.config import OptimizerConfig
from llara_dist.errors import InputError
from llara_dist.hashing import hash64, text_seed
from llara_dist.model.hybrid import HybridLlama
from llara_dist.stream.loader import Step
from llara_dist.supervision.progress import Phase
from llara_dist.training.clipping import Clipping
from llara_dist.training.optimizer_state import forget_moments
from llara_dist.training.phases import Phases


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave; the same on every rank.

    Attributes:
        loss: summed answer cross-entropy ÷ answer tokens of the global step, in nats; not finite only where skipped.
        norm: global gradient norm before clipping; a tensor where DeepSpeed alone knows it; None where the step was
            skipped.
        skipped: whether loss or gradients were not finite, so that nothing was updated.
        votes: of each vote, whether any rank said yes.
        suspects: where skipped, the keys of the samples in whose micro-batches it began, of all ranks.
    """

    loss: float
    norm: float | Tensor | None
    skipped: bool = False
    votes: tuple[bool, ...] = ()
    suspects: tuple[int, ...] = ()

    @property
    def grad_norm(self) -> float | None:
        """The global gradient norm as a number: read from the device only here, for who logs it."""
        return None if self.norm is None else float(self.norm)


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
        self.ds_config = ds_config
        self._clipping = Clipping(ds_config, optimizer.max_grad_norm, world.size)
        # Turns NaN for good, within a step, when a gradient that is not finite comes by; see `_watch_gradients`.
        self._gradient_check = torch.zeros((), dtype=torch.float32, device=device)
        self.phases = Phases(device)
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
                    # Waits for the device twice a micro-batch; metrics.jsonl tells the speed without.
                    "timers": {"throughput": {"enabled": False}},
                    "train_micro_batch_size_per_gpu": 1,
                    "gradient_accumulation_steps": 1,
                    **self._clipping.settings(ds_config),
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
        self._watch_gradients()

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer; `optimizer_state` reads and writes its moments."""
        return self._optimizer

    def train_step(self, step: Step, lora_lr: float, projector_lr: float, votes: Sequence[bool] = ()) -> StepResult:
        """One optimizer step: every micro-batch forward and backward, one reduction, one update.

        A micro-batch's loss is its summed answer loss × world size ÷ answer tokens of the global step: DeepSpeed
        averages gradients over ranks, which cancels the world size.

        Before the update the ranks agree, in one collective and the step's one host synchronisation, on the loss, on
        the gradients' norm, on whether every gradient was finite, and on what is put to the vote. Where something was
        not finite nobody updates anything.

        Args:
            step: this rank's micro-batches; equally many on every rank.
            lora_lr: rate of the adapters.
            projector_lr: rate of the projector; 0 holds it exactly still (decay is off too) and keeps its moments
                fresh: Adam's step count would go on while nothing moves, its bias corrections would be spent, and
                the first updates after 1,000 idle steps would reach five times the rate.
            votes: what is so if any rank says so, e.g. that it was asked to stop; equally many on every rank.
        """
        for group, rate, decay in zip(self._optimizer.param_groups, (lora_lr, projector_lr), self._decay, strict=True):
            group["lr"], group["weight_decay"] = rate, decay if rate > 0 else 0.0
        self._gradient_check.zero_()
        self.phases.begin()
        summed = torch.zeros((), dtype=torch.float64, device=self.device)
        trail: list[Tensor] = []
        agreed, finite = [math.nan] * 3, False
        norm: float | Tensor | None = None
        last = len(step.microbatches) - 1
        for index, batch in enumerate(step.microbatches):
            keys = None if batch.is_empty else batch.keys
            self.phases.enter(Phase.FORWARD, step.index, index, keys)
            seed_dropout(self.seed, step.index, *step.places[index])
            loss = self._engine(batch.to(self.device))
            summed += loss.detach()
            self.phases.enter(Phase.BACKWARD, step.index, index, keys)
            self._engine.set_gradient_accumulation_boundary(index == last)
            self._engine.backward(loss * (self.world.size / step.answer_tokens))
            trail.append(summed + self._gradient_check)
            if index < last:
                self._engine.step()
                continue
            self.phases.enter(Phase.REDUCE, step.index, index, keys)
            gradients = self._clipping.gradients(self._optimizer, self.parameters.values())
            square = self._clipping.squared_norm(gradients, self.device)
            mine = [summed, self._gradient_check.double(), square]
            mine += [torch.full_like(summed, float(vote)) for vote in votes]
            agreed = distributed.sum_tensor(torch.stack(mine)).tolist()
            self.phases.enter(Phase.STEP, step.index, index, keys)
            finite = math.isfinite(agreed[0] + agreed[1])
            norm = math.sqrt(agreed[2]) if finite else math.nan
            self._clipping.clip(gradients, norm)
            with contextlib.nullcontext() if finite else self._no_update():
                self._engine.step()
        if projector_lr == 0:
            forget_moments(self._optimizer, self.model.projector_parameters())
        self.phases.leave()
        if not self._clipping.is_ours:
            norm = self._engine.get_global_grad_norm()
        return StepResult(
            loss=agreed[0] / step.answer_tokens,
            norm=norm if finite else None,
            skipped=not finite,
            votes=tuple(count > 0 for count in agreed[3:]),
            suspects=() if finite else _suspects(step, trail),
        )

    def _watch_gradients(self) -> None:
        """Let every gradient leave a mark if it is not finite, before DeepSpeed reduces, partitions or casts it.

        Hooks on the parameters see the same under every stage; what DeepSpeed itself does with such a gradient depends
        on stage, precision and version.
        """

        def mark(gradient: Tensor) -> None:
            self._gradient_check.add_(gradient.detach().sum(dtype=torch.float32), alpha=0.0)  # 0 · inf = 0 · nan = nan

        for parameter in self.parameters.values():
            parameter.register_hook(mark)

    @contextlib.contextmanager
    def _no_update(self) -> Iterator[None]:
        """DeepSpeed's step runs through (norm, clearing of gradients, gathering), AdamW's update inside it does not."""
        inner: Any = self._optimizer
        inner = inner if isinstance(inner, torch.optim.Optimizer) else inner.optimizer
        update = inner.step
        inner.step = lambda *_, **__: None
        try:
            yield
        finally:
            inner.step = update


def seed_dropout(seed: int, step: int, rank: int, microbatch: int) -> None:
    """Dropout is a function of (seed, step, rank, micro-batch), so that a resumed or replayed step repeats exactly."""
    torch.manual_seed(int(hash64(text_seed("dropout"), seed, step, rank, microbatch)) >> 1)


def _suspects(step: Step, trail: list[Tensor]) -> tuple[int, ...]:
    """Keys of the samples in the first micro-batch of each rank after which something was not finite; a collective."""
    finite = torch.isfinite(torch.stack(trail)).tolist()
    mine = [] if all(finite) else step.microbatches[finite.index(False)].keys.tolist()
    return tuple(key for keys in distributed.gather_objects(mine) for key in keys)
