"""The ranks of a run, one after the other in one process: the steps that lead up to one, and that one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from llara_dist import distributed
from llara_dist.config import RunConfig
from llara_dist.console import progress
from llara_dist.distributed import World
from llara_dist.model.hybrid import HybridLlama, build_hybrid_llama
from llara_dist.replay.history import Layout
from llara_dist.replay.inspection import MicrobatchResult, inspect_microbatch
from llara_dist.stream.loader import Step, StepMaker
from llara_dist.training.checkpoints.checkpoint import load_moments, load_parameters
from llara_dist.training.curriculum import Curriculum
from llara_dist.training.engine import Engine, StepResult, seed_dropout
from llara_dist.training.preflight.examine import Inputs
from llara_dist.training.schedule import learning_rates


@dataclass(frozen=True)
class StepInspection:
    """What the looked-at micro-batches of a step gave.

    Attributes:
        microbatches: in the order of ranks.
        loss: summed loss ÷ answer tokens of the global step; of the step where all ranks were looked at. None where
            it is not finite.
        grad_norm: of their summed gradients, before clipping; None where it is not finite.
    """

    microbatches: list[MicrobatchResult]
    loss: float | None
    grad_norm: float | None


class WorldReplay:
    """Computes what all ranks of a run computed.

    Args:
        config: of the run.
        inputs: what it stands on; its checkpoint is where the weights come from, None = the initial ones.
        layout: of a step, how its rows were shared out.
        device: to compute on.
    """

    def __init__(
        self, config: RunConfig, inputs: Inputs, layout: Callable[[int], Layout], device: torch.device
    ) -> None:
        self.config, self.inputs, self.device = config, inputs, device
        self.curriculum = Curriculum(config.curriculum, inputs.total_steps, config.seed)
        self._layout = layout
        self._model: HybridLlama | None = None

    @property
    def first_step(self) -> int:
        """The step whose weights the checkpoint holds."""
        return self.inputs.checkpoint.step if self.inputs.checkpoint is not None else 0

    def maker(self, step: int, rank: int = 0) -> StepMaker:
        """Makes a step as a rank had it."""
        layout = self._layout(step)
        budget = layout.max_tokens_per_microbatch
        return StepMaker(self.inputs.shards, self.inputs.plan, self.curriculum.draw, rank, layout.nodes, budget)

    @property
    def model(self) -> HybridLlama:
        """The model with the checkpoint's weights, loaded when it is first asked for; in training mode."""
        if self._model is None:
            config = self.config
            table = self.inputs.item_table.weight
            # Gradients of one sample after the other go back through one graph, which Liger's SwiGLU overwrites and
            # torch.compile frees. Neither decides over dropout, as `lora` and `last_layer` do.
            kernels = dataclasses.replace(config.kernels, layers="torch", compile=False)
            self._model = build_hybrid_llama(
                config.model, config.lora, config.projector, table, self.device, config.seed, kernels=kernels
            )
            if self.inputs.checkpoint is not None:
                load_parameters(self._model, self.inputs.checkpoint)
            self._model.train()
        return self._model

    def advance(self, last: int) -> list[StepResult]:
        """Do the steps before `last` as the whole world did: every rank's micro-batches, then one update."""
        distributed.initialise(World(), self.device)
        try:
            settings = self.config.optimizer
            engine = Engine(self.model, self.inputs.ds_config, settings, self.device, World(), self.config.seed)
            if self.inputs.checkpoint is not None:
                load_moments(engine, self.inputs.checkpoint)
            results = []
            for number in progress(range(self.first_step, last), "replaying steps"):
                probability = self.curriculum.probability(number)
                rates = learning_rates(number, self.inputs.total_steps, settings, probability)
                results.append(engine.train_step(self.maker(number).make_whole(number), *rates))
            return results
        finally:
            distributed.shut_down()

    def inspect(self, step: Step, per_sample: bool = False) -> StepInspection:
        """Forward and backward of a step's micro-batches, without an update.

        Args:
            step: made by `maker`; all of its micro-batches are looked at.
            per_sample: whether each sample's gradient is computed as well.
        """
        parameters = list((self.model.lora_parameters() | self.model.projector_parameters()).values())
        total = [torch.zeros_like(parameter) for parameter in parameters]
        results = []
        for batch, place in progress(list(zip(step.microbatches, step.places, strict=True)), "micro-batches"):
            if batch.is_empty:
                results.append(MicrobatchResult(*place, batch.num_tokens, 0, 0.0, 0.0, "", []))
                continue
            seed_dropout(self.config.seed, step.index, *place)
            result, gradients = inspect_microbatch(
                self.model, parameters, batch, place, step.answer_tokens, self.device, per_sample
            )
            results.append(result)
            if gradients is not None:
                for whole, part in zip(total, gradients, strict=True):
                    whole.add_(part)
        sums = [result.loss_sum for result in results]
        norms = [result.grad_norm for result in results]
        loss = None if None in sums else sum(value for value in sums if value is not None) / step.answer_tokens
        return StepInspection(results, loss, None if None in norms else float(torch.nn.utils.get_total_norm(total)))


def only(step: Step, microbatches: Iterable[int]) -> Step:
    """The step with some of its micro-batches; the numbers of the global step stay.

    Args:
        step: as made.
        microbatches: their places in `step.microbatches`.
    """
    chosen = list(microbatches)
    return dataclasses.replace(
        step, microbatches=[step.microbatches[n] for n in chosen], places=[step.places[n] for n in chosen]
    )
