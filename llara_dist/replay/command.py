"""`llara-dist debug`: one step of a cluster run reproduced in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from llara_dist import distributed
from llara_dist.config import CheckpointConfig, KernelsConfig, RunConfig, ValidationConfig
from llara_dist.console import say, warn
from llara_dist.data.tokenizer import load_tokenizer
from llara_dist.distributed import World
from llara_dist.errors import InputError
from llara_dist.model.kernels import chooser, runnable
from llara_dist.replay.history import Layout, Past, find_checkpoint
from llara_dist.replay.occurrences import ids_of_key, occurrences
from llara_dist.replay.report import report_folder, show_and_write, show_occurrences, show_shares
from llara_dist.replay.world import WorldReplay, only
from llara_dist.stream.loader import Step
from llara_dist.stream.locations import is_remote, node_cache, open_samples
from llara_dist.stream.plan import Plan
from llara_dist.training.checkpoints.checkpoint import Checkpoint
from llara_dist.training.curriculum import Curriculum
from llara_dist.training.engine import StepResult
from llara_dist.training.fit_device import fit_device
from llara_dist.training.preflight.examine import open_inputs


def debug(
    run: Path,
    step: int | None = None,
    rank: int | Literal["all"] | None = None,
    micro_batch: int | None = None,
    sample: int | None = None,
    checkpoint: str = "auto",
    from_checkpoint_only: bool = False,
    per_sample_gradients: bool = False,
    world: int | list[int] | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Compute one step of a run again in this process: batch, dropout and weights as a rank had them.

    The run is only read, and may be running. With --rank all the step's loss and gradient norm are compared with
    those that the run logged. Where the newest checkpoint lies before the step, the steps between are done again,
    every rank's micro-batches one after the other.

    Args:
        run: the run's folder.
        step: optimizer step, from 0, as in metrics.jsonl and events.jsonl.
        rank: whose micro-batches are computed, or all; by default rank 0's, beside a summary of all ranks' shares.
        micro_batch: only this one of the rank, from 0.
        sample: instead of a step, a sample's key: tells in which steps it occurs, and who computes it there.
        checkpoint: auto = the newest one that is not after the step, else the initial weights; latest; or
            step-00001234. One after the step shows the step's batch under its weights.
        from_checkpoint_only: show the step's batch under the checkpoint's weights, without the steps between.
        per_sample_gradients: each sample's gradient norm too, one backward pass each.
        world: ranks of the run, or of each node '[8, 8]', where they are not recorded or to try another number.
        device: auto, cpu or cuda; by default the run's.
        out: where the batch and a report are written; by default RUN-debug beside the run.

    Raises:
        InputError: no run, no such step, rank, micro-batch or sample, or inputs that are not the run's any more.
    """
    if distributed.read_world().size > 1:
        raise InputError("llara-dist debug runs in one process, several were started: use it without a launcher")
    if (step is None) == (sample is None):
        raise InputError("llara-dist debug: give either --step N or --sample KEY")
    past = Past.read(Path(run), _nodes(world))
    if step is None:
        assert sample is not None
        return find_sample(past, sample)
    folder = report_folder(past.run, out, step)
    config = replay_config(past, step, folder, device)
    inputs = open_inputs(config, World())
    past.require_same(inputs.contract)
    if not 0 <= step < inputs.total_steps:
        raise InputError(f"--step {step}: {past.run} has the steps 0 to {inputs.total_steps - 1}")
    by_node = is_remote(inputs.shards)
    inputs = dataclasses.replace(inputs, checkpoint=find_checkpoint(past.run, checkpoint, step))
    on = distributed.pick_device(config.device, World())
    replay = WorldReplay(config, inputs, lambda number: past.layout(number, by_node), on)
    layout, shared = past.layout(step, by_node), replay.maker(step).share(step)
    chosen = choose(replay, step, layout, rank, micro_batch)
    show_shares(step, inputs.total_steps, layout, shared, replay.curriculum.probability(step))
    warn_of_device(inputs.checkpoint, on)
    if config.lora.dropout:
        first = step if from_checkpoint_only else min(replay.first_step, step)
        warn_of_masks((past.kernels(number) for number in range(first, step + 1)), config.kernels)
    replayed = advance(replay, replay.first_step if from_checkpoint_only else step, step, past, layout)
    found = replay.inspect(chosen, per_sample_gradients)
    report = {
        "run": str(past.run),
        "step": step,
        "epoch": chosen.epoch,
        "probability": replay.curriculum.probability(step),
        "nodes": list(layout.nodes),
        "max_tokens_per_microbatch": layout.max_tokens_per_microbatch,
        "checkpoint": None if inputs.checkpoint is None else str(inputs.checkpoint.path),
        "weights_of_step": replay.first_step + len(replayed),
        "replayed": compare(replayed, replay.first_step, past),
        **dataclasses.asdict(found),
        "is_whole_step": rank == "all" or (layout.world_size == 1 and micro_batch is None),
        "logged": past.logged(step),
        "folder": str(folder),
    }
    show_and_write(folder, report, found, chosen, load_tokenizer(config.model.path, config.model.revision))
    return report


def _nodes(world: int | list[int] | None) -> list[int]:
    nodes = [] if world is None else [world] if isinstance(world, int) else world
    if any(ranks < 1 for ranks in nodes):
        raise InputError(f"--world {world}: ranks of the run, or of each node, 1 or more")
    return nodes


def replay_config(past: Past, step: int, folder: Path, device: Literal["auto", "cpu", "cuda"] | None) -> RunConfig:
    """The run's settings for one process: stage 0, no workers, the step's token budget and adapters; fits the device.

    Args:
        past: of the run.
        step: that is reproduced.
        folder: where the report will lie; nothing of the run itself is written.
        device: None = the run's.

    Raises:
        InputError: it is not known how the step was shared out, or there is no such device or model.
    """
    config, budget = past.config, past.layout(step).max_tokens_per_microbatch
    on = distributed.pick_device(device or config.device, World())
    config = dataclasses.replace(
        config,
        deepspeed=Path("ds_configs/zero0.json"),
        out=folder,
        resume="no",
        device=device or config.device,
        kernels=runnable(past.kernels(step), chooser(config.model, on)),
        data=dataclasses.replace(config.data, workers=0, max_tokens_per_microbatch=budget),
        checkpoint=CheckpointConfig(every_steps=0, keep_last=1),
        validation=ValidationConfig(),
    )
    return fit_device(config, keep_budget=True)


def choose(
    replay: WorldReplay, step: int, layout: Layout, rank: int | Literal["all"] | None, microbatch: int | None
) -> Step:
    """The step with the micro-batches that are asked for.

    Raises:
        InputError: there is no such rank or micro-batch.
    """
    if rank == "all":
        if microbatch is not None:
            raise InputError("--micro_batch is counted within a rank: give the number of one as --rank")
        return replay.maker(step).make_whole(step)
    wanted = rank or 0
    if not 0 <= wanted < layout.world_size:
        raise InputError(
            f"--rank {wanted}: step {step} had the ranks 0 to {layout.world_size - 1} ({layout.known_from})"
        )
    made = replay.maker(step, wanted).make(step)
    if microbatch is None:
        return made
    if not 0 <= microbatch < len(made.microbatches):
        raise InputError(
            f"--micro_batch {microbatch}: rank {wanted} has 0 to {len(made.microbatches) - 1} in step {step}"
        )
    return only(made, [microbatch])


def warn_of_device(checkpoint: Checkpoint | None, device: torch.device) -> None:
    """Say where another device than the run's gives other dropout masks and rounding."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    hosts = [] if checkpoint is None else checkpoint.state["hosts"].values()
    others = sorted({other for host in hosts for other in host["devices"]} - {name})
    if others:
        warn(f"the run computed on {', '.join(others)}, this process on {name}: rounding, and dropout, may differ")


def warn_of_masks(then: Iterable[KernelsConfig], now: KernelsConfig) -> None:
    """Say where other kernels than the run's draw other dropout masks.

    Args:
        then: of each step that is computed.
        now: what computes them.
    """
    seen = set(then)
    if any(kernels.compile for kernels in seen):
        warn("the run was compiled, this process does not compile: dropout may differ")
    for name in ("lora", "last_layer"):
        others = {getattr(kernels, name) for kernels in seen} - {getattr(now, name)}
        if others:
            warn(
                f"kernels.{name} was {', '.join(sorted(others))} in steps that are computed here with "
                f"{getattr(now, name)}: their dropout differs"
            )


def advance(replay: WorldReplay, last: int, step: int, past: Past, layout: Layout) -> list[StepResult]:
    """Do the steps between the checkpoint and `last` again, and say before which weights these are and what it takes.

    Args:
        replay: stands at its checkpoint.
        last: the step to stand at then; not after its checkpoint: nothing is done.
        step: that is wanted.
        past: of the run.
        layout: of the step.
    """
    first, source = replay.first_step, replay.inputs.checkpoint
    name = "the initial weights" if source is None else source.path.name
    if first >= last:
        which = "" if first == step else f": those of step {first}, not of step {step}"
        say(f"weights: {name}{which}")
        return []
    seconds = sum(past.rows[number]["step_s"] for number in range(first, last) if number in past.rows)
    say(
        f"weights: {name}; steps to be done again: {last - first}, {layout.world_size} ranks one after the other; "
        f"their own time adds up to {timedelta(seconds=round(seconds * layout.world_size))} "
        "(--from_checkpoint_only true leaves them out)"
    )
    return replay.advance(last)


def compare(replayed: list[StepResult], first_step: int, past: Past) -> dict[str, Any]:
    """How far the steps that were done again are from those that the run logged.

    Args:
        replayed: one result a step.
        first_step: the first one's number.
        past: of the run.

    Returns:
        `steps`; `skipped`, the numbers of those in which nothing was updated; `largest_difference`, of a loss,
        relative, None where no step was logged.
    """
    numbered = dict(enumerate(replayed, first_step))
    apart = [
        abs(result.loss - logged["loss"]) / abs(logged["loss"])
        for number, result in numbered.items()
        if not result.skipped and (logged := past.logged(number)) is not None and logged["loss"]
    ]
    skipped = [number for number, result in numbered.items() if result.skipped]
    found = {"steps": len(replayed), "skipped": skipped, "largest_difference": max(apart, default=None)}
    if apart:
        say(f"steps done again: {len(replayed)}; losses differ from the logged ones by {max(apart):.1e} at most")
    return found


def find_sample(past: Past, key: int) -> dict[str, Any]:
    """Show in which steps a sample occurs.

    Raises:
        InputError: no training sample has the key, or the shards are not the run's any more.
    """
    config = past.config
    shards = open_samples(config.data.shards, "train", node_cache(config.data))
    plan = Plan(shards.sources, config.seed, config.data.global_batch_samples, config.data.epochs, config.data.lanes)
    if past.states:
        past.require_same(past.states[-1]["contract"] | {"plan": plan.hash})
    ids = ids_of_key(shards, key)
    if not len(ids):
        raise InputError(f"--sample {key}: no training sample of {config.data.shards} has this key")
    total = min(plan.num_steps, config.data.max_steps or plan.num_steps)
    draw = Curriculum(config.curriculum, total, config.seed).draw
    by_node = is_remote(shards)
    found = list(occurrences(ids, shards, plan, draw, lambda step: past.layout(step, by_node), total))
    done = max(past.rows, default=-1)
    show_occurrences(past.run, key, found, done)
    return {"run": str(past.run), "sample": key, "occurrences": [dataclasses.asdict(each) for each in found]}
