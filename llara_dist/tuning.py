"""`llara-dist train`: training put together with what it is given from other rooms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llara_dist import distributed
from llara_dist.config import RunConfig
from llara_dist.console import say
from llara_dist.distributed import World
from llara_dist.errors import RankLostError, RequeueError, RunFailedError
from llara_dist.evaluation.validation import open_validator
from llara_dist.supervision.progress import Phase
from llara_dist.supervision.rank_status import RankStatus
from llara_dist.supervision.restarts import may_requeue, record_start
from llara_dist.supervision.run_lock import hold_run
from llara_dist.supervision.stop_signals import StopSignals
from llara_dist.supervision.watchdog import RankMonitor
from llara_dist.training.checkpoints.writer import newest_step
from llara_dist.training.debug import Debugger, clear, shrink
from llara_dist.training.loop import StoppedError, train_loop
from llara_dist.training.preflight.examine import Inputs, open_inputs
from llara_dist.training.run import open_run


def train(config: RunConfig, debug: bool = False, profile: bool = False) -> dict[str, Any]:
    """Tune LoRA and projector; the same code on one process, under `deepspeed`, `torchrun` and `srun`.

    Args:
        config: the run.
        debug: make it small and loud, on one process (see `training/debug.py`).
        profile: let rank 0 write a torch profiler trace of three steps to OUT/profile.

    Returns:
        What the run did: steps, last loss, folder, whether validation ended it early.

    Raises:
        InputError: bad input, found before any weight is read wherever that is possible; another job has the run.
        RequeueError: a rank got SIGTERM or SIGUSR1; a checkpoint is written, the run goes on when started again.
        RankLostError: another rank died or hung.
        RunFailedError: too many steps were not finite, or requeueing leads nowhere.
    """
    world = distributed.read_world()
    if debug:
        config = shrink(config, world)
    inputs = open_inputs(config, world)
    if debug:
        clear(config.out)
    device = distributed.pick_device(config.device, world)
    faults, status, signals = config.faults, RankStatus(), StopSignals()
    # The group's own time-out knows less than the watchdog's report, which is to come first.
    distributed.initialise(world, device, timeout_s=max(1800.0, 3 * faults.hang_timeout_s))
    try:
        with (
            signals,
            hold_run(config.out, faults.heartbeat_s, world) as held,
            RankMonitor(config.out, status, world, held.token, faults.heartbeat_s, faults.hang_timeout_s),
        ):
            status.enter(Phase.LOADING)
            inputs = reopened(config, inputs, world)
            debugger = Debugger(config, device) if debug else None
            validator = open_validator(config, world, status.touch)
            run = open_run(config, inputs, world, device, validator, held.check)
            run.engine.phases.watcher = status.enter
            if world.is_main:
                record_start(config.out, distributed.read_job(), run.first_step)
                announce(config, inputs)
            try:
                result = train_loop(run, debugger, profile, lambda: signals.requested is not None, lambda: held.lost)
            except StoppedError as stopped:
                signals.ignore()  # one that is sent again must not replace the exit code
                raise requeue(config.out, stopped.done, world) from None
    except RankLostError:
        raise  # to take a group down whose member is gone may wait for it for ever
    except BaseException:
        distributed.shut_down()
        raise
    else:
        distributed.shut_down()
        return result


def reopened(config: RunConfig, inputs: Inputs, world: World) -> Inputs:
    """The run's inputs, opened again where the job that held the lock before has saved since they were; a collective.

    Raises:
        InputError: what was found wrong with them this time.
    """
    seen = None if inputs.checkpoint is None else inputs.checkpoint.step
    is_stale = world.is_main and config.resume == "auto" and newest_step(config.out / "checkpoints") != seen
    return open_inputs(config, world) if distributed.gather_objects(is_stale)[0] else inputs


def announce(config: RunConfig, inputs: Inputs) -> None:
    """Say where the run begins and what a user may not expect of its data."""
    if inputs.plan.epoch(inputs.total_steps - 1) > 0 and inputs.plan.repeats_passes:
        say(
            f"{config.data.shards} holds fewer passes than the run reads: later epochs show the same prompts and "
            "candidates again; build with more --passes to draw them anew"
        )
    if inputs.checkpoint is not None:
        say(f"going on from step {inputs.checkpoint.step} of {inputs.total_steps}")


def requeue(out: Path, done: int, world: World) -> RequeueError | RunFailedError:
    """How a run that was asked to stop ends: to be started again, unless that has led nowhere; a collective."""
    again = distributed.gather_objects(may_requeue(out, done) if world.is_main else None)[0]
    if again:
        return RequeueError(f"{out}: asked to stop, safe up to step {done}: start again with --resume auto to go on")
    return RunFailedError(
        f"{out}: asked to stop again before a single step was done, safe up to step {done}: no use in being requeued; "
        "give the job more time, or find out why starting takes so long"
    )
