"""One run put together: inputs, plan, curriculum, engine, and where to begin."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from llara_dist.config import RunConfig, to_dict
from llara_dist.distributed import World, node_ranks
from llara_dist.ds_config import zero_stage
from llara_dist.integrity import write_json
from llara_dist.model.hybrid import build_hybrid_llama
from llara_dist.stream.loader import StepLoader
from llara_dist.stream.locations import absolute_location, is_remote
from llara_dist.stream.lookahead import start_lookahead
from llara_dist.training.checkpoints.checkpoint import load_moments, load_parameters
from llara_dist.training.checkpoints.provenance import provenance
from llara_dist.training.checkpoints.writer import CheckpointWriter, SaveTimes
from llara_dist.training.curriculum import Curriculum
from llara_dist.training.engine import Engine
from llara_dist.training.faults import Faults
from llara_dist.training.fit_device import choose_recomputed
from llara_dist.training.preflight.examine import Inputs
from llara_dist.training.schedule import learning_rates
from llara_dist.training.scores import ValidationScores, Validator
from llara_dist.training.validations import Validations


@dataclass(frozen=True)
class Run:
    """What the loop works with.

    Attributes:
        config: as given, with what `auto` came to.
        engine: the model under DeepSpeed.
        curriculum: p(τ) and the draws.
        loader: this rank's steps from `first_step` on.
        first_step: 0, or where the checkpoint left off.
        total_steps: T.
        faults: what went wrong so far.
        validations: when the run validates, and what came of it.
        origin: where the run comes from, as its checkpoints tell it.
        writer: of checkpoints.
    """

    config: RunConfig
    engine: Engine
    curriculum: Curriculum
    loader: StepLoader
    first_step: int
    total_steps: int
    faults: Faults
    validations: Validations
    origin: dict[str, Any]
    writer: CheckpointWriter

    def rates(self, step: int) -> tuple[float, float]:
        """Learning rates of LoRA and projector at a step."""
        return learning_rates(step, self.total_steps, self.config.optimizer, self.curriculum.probability(step))

    def save(self, done: int, best: ValidationScores | None = None, required: bool = False) -> SaveTimes:
        """Save the run after `done` optimizer steps; every rank calls it. The last save waits and must succeed.

        Args:
            done: optimizer steps.
            best: what validation gave after them, where it was the best so far.
            required: the run ends here, though steps may be left.

        Raises:
            InputError: the checkpoint with which the run ends could not be written.
        """
        state = {
            "step": done,
            "total_steps": self.total_steps,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "progress": {"skipped_steps": self.faults.skipped, "validations": self.validations.to_dict()},
            **self.origin,
        }
        return self.writer.save(self.engine, state, best, required=required or done == self.total_steps)

    @property
    def validated(self) -> int:
        """The last step whose validation this start does not repeat."""
        return self.first_step - self.validations.owes(self.first_step)

    def log_due(self, step: int) -> bool:
        """Whether a step gets a line in the log."""
        return step % self.config.log_every_steps == 0 or step + 1 == self.total_steps

    def checkpoint_due(self, done: int) -> bool:
        """Whether a checkpoint is written after `done` steps."""
        every = self.config.checkpoint.every_steps
        return done == self.total_steps or (every > 0 and done % every == 0)


def absolute(config: RunConfig) -> RunConfig:
    """The same run with its local inputs named from the root, so that it is found again from any folder."""
    model = config.model
    if Path(model.path).is_dir():
        model = dataclasses.replace(model, path=str(Path(model.path).resolve()))
    return dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, shards=absolute_location(config.data.shards)),
        recommender=dataclasses.replace(config.recommender, path=config.recommender.path.resolve()),
        out=config.out.resolve(),
    )


def open_run(
    config: RunConfig,
    inputs: Inputs,
    world: World,
    device: torch.device,
    validator: Validator | None = None,
    may_write: Callable[[], None] = lambda: None,
) -> Run:
    """Load the model, restore the checkpoint if there is one, and stand at the first step to run.

    Args:
        config: the run.
        inputs: what `open_inputs` made of it.
        world: where this process stands.
        device: of this rank.
        validator: what validates the run; None = nothing does.
        may_write: raises where the run's folder is another's by now; asked around every write of a checkpoint.

    Raises:
        InputError: a weight does not load.
    """
    config = choose_recomputed(config, inputs.shards, inputs.item_table.weight, inputs.ds_config, world, device)
    model = build_hybrid_llama(
        config.model,
        config.lora,
        config.projector,
        inputs.item_table.weight,
        device,
        config.seed,
        place=zero_stage(inputs.ds_config) < 3,
        kernels=config.kernels,
    )
    if inputs.checkpoint is not None:
        load_parameters(model, inputs.checkpoint)
    engine = Engine(model, inputs.ds_config, config.optimizer, device, world, config.seed)
    if inputs.checkpoint is not None:
        load_moments(engine, inputs.checkpoint)
    curriculum = Curriculum(config.curriculum, inputs.total_steps, config.seed)
    first_step = inputs.checkpoint.step if inputs.checkpoint is not None else 0
    nodes, lookahead = None, None
    steps = range(first_step, inputs.total_steps)
    if is_remote(inputs.shards) and len(steps):
        by_node = node_ranks(world)
        nodes = tuple(len(ranks) for ranks in by_node)
        if world.local_rank == 0:
            ranks = next(ranks for ranks in by_node if world.rank in ranks)
            lookahead = start_lookahead(inputs.shards, inputs.plan, config.data, steps, ranks, world.size)
    loader = StepLoader(
        inputs.shards,
        inputs.plan,
        curriculum.draw,
        nodes=nodes,
        lookahead=lookahead,
        rank=world.rank,
        world_size=world.size,
        max_tokens_per_microbatch=config.data.max_tokens_per_microbatch,
        first_step=first_step,
        last_step=inputs.total_steps,
        num_workers=config.data.workers,
        pin_memory=device.type == "cuda",
    )
    progress = inputs.checkpoint.progress if inputs.checkpoint is not None else {}
    faults = Faults(config.faults, config.out, progress.get("skipped_steps", 0), world.is_main)
    origin = provenance(to_dict(absolute(config)), inputs, inputs.contract, world, device)
    saving = config.checkpoint
    folder = config.out / "checkpoints"
    writer = CheckpointWriter(folder, saving.keep_last, saving.asynchronous, may_write=may_write)
    validations = Validations(validator, config.validation, inputs.total_steps, progress.get("validations", {}))
    if world.is_main:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / "config.json", to_dict(absolute(config)))
    return Run(config, engine, curriculum, loader, first_step, inputs.total_steps, faults, validations, origin, writer)
