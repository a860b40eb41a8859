"""`llara-dist train`: training put together with what it is given from other rooms."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from llara_dist import distributed
from llara_dist.config import RunConfig
from llara_dist.console import say
from llara_dist.distributed import World
from llara_dist.ds_config import zero_stage
from llara_dist.errors import InputError, RequeueError, RunFailedError
from llara_dist.evaluation.validation import open_validator
from llara_dist.model.kernels import Kernels, chooser
from llara_dist.supervision.diagnosis import ranges
from llara_dist.supervision.early_end import early_end_told
from llara_dist.supervision.progress import Phase
from llara_dist.supervision.rank_logs import RankLog
from llara_dist.supervision.rank_status import RankStatus
from llara_dist.supervision.restarts import may_requeue, record_start
from llara_dist.supervision.run_lock import hold_run
from llara_dist.supervision.stop_signals import StopSignals
from llara_dist.supervision.watchdog import RankMonitor
from llara_dist.training.between_steps import StoppedError
from llara_dist.training.checkpoints.folders import newest_step
from llara_dist.training.debug import Debugger, check_folder, shrink
from llara_dist.training.fit_device import DEBUG_BYTES, fit_device
from llara_dist.training.loop import train_loop
from llara_dist.training.memory import peak_memory_mib
from llara_dist.training.preflight.examine import Inputs, check_out, open_inputs
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
        RequeueError: a rank got SIGTERM, SIGUSR1 or Ctrl-C; a checkpoint is written, and it goes on when started again.
        RankLostError: another rank died or hung.
        RunFailedError: too many steps were not finite, or requeueing leads nowhere.
    """
    world = distributed.read_world()
    with RankLog(world) as log:
        return tune(config, debug, profile, world, log)


def tune(config: RunConfig, debug: bool, profile: bool, world: World, log: RankLog) -> dict[str, Any]:
    """What `train` does; `log` keeps what this rank prints."""
    if debug:
        config = fit_device(shrink(config, world), DEBUG_BYTES)
        check_folder(config.out)
    job = distributed.read_job()
    with early_end_told(config.out, world, job):
        inputs = open_inputs(config, world)
        device = distributed.pick_device(config.device, world)
    faults, status, signals = config.faults, RankStatus(), StopSignals(speaks=world.is_main)

    def stop_requested() -> bool:
        return signals.requested is not None

    # The group's own time-out knows less than the watchdog's report, which is to come first.
    with early_end_told(config.out, world, job, joining=True):
        distributed.initialise(world, device, timeout_s=max(1800.0, 3 * faults.hang_timeout_s))
    try:
        with (
            signals,
            hold_run(config.out, faults.heartbeat_s, world) as held,
            RankMonitor(config.out, status, world, held.token, faults.heartbeat_s, faults.hang_timeout_s),
        ):
            log.begin(config.out, job)
            status.enter(Phase.LOADING)
            inputs = reopened(config, inputs, world)
            require_same_kernels(chooser(config.model, device, zero_stage(inputs.ds_config))(config.kernels))
            debugger = Debugger(config, device) if debug else None
            validator = open_validator(config, world, status.touch, stop_requested)
            run = open_run(config, inputs, world, device, validator, held.check)
            run.engine.phases.watcher = status.enter
            status.total_steps, status.memory = run.total_steps, partial(peak_memory_mib, device)
            if world.is_main:
                maker = run.loader.maker
                tokens = maker.max_tokens_per_microbatch
                kernels = run.engine.model.kernels
                record_start(config.out, job, run.first_step, maker.nodes, tokens, kernels.values())
                announce(config, inputs)
                say(f"kernels: {kernels}")
                if run.validations.measured_anew:
                    say("validation is measured in another way than before: its best score and patience begin anew")
            try:
                result = train_loop(run, debugger, profile, stop_requested, lambda: held.lost)
            except StoppedError as stopped:
                signals.ignore()  # one that is sent again must not replace the exit code
                raise requeue(config.out, stopped.done, world) from None
    except (RequeueError, RunFailedError):
        distributed.shut_down()
        raise
    except BaseException:
        if world.size == 1:
            distributed.shut_down()
        raise  # else it may be this rank's alone: to take down a group whose members compute may wait for ever
    distributed.shut_down()
    return result


def reopened(config: RunConfig, inputs: Inputs, world: World) -> Inputs:
    """The run's inputs under the lock, opened again where they are not what every rank finds now; a collective.

    They were opened before the ranks knew of each other: the job that held the lock before may have saved since, and a
    shared file system may show an old listing to some nodes.

    Raises:
        InputError: what was found wrong with them this time, or ranks still see different checkpoints.
    """
    if config.resume == "no":
        refusal = None
        if world.is_main:
            try:
                check_out(config)
            except InputError as error:
                refusal = str(error)
        refusal = distributed.of_main(refusal)
        if refusal is not None:
            raise InputError(refusal)
        return inputs
    newest = newest_step(config.out / "checkpoints")
    seen = distributed.gather_objects((step_of(inputs), newest))
    if any(step != seen[0][1] for step, _ in seen):
        inputs = open_inputs(config, world)
        steps = distributed.gather_objects(step_of(inputs))
        if any(step != steps[0] for step in steps):
            raise InputError(
                f"{config.out}: ranks see different newest checkpoints, of steps {sorted({str(s) for s in steps})}: "
                "the file system shows an old listing to some nodes; start again in a minute"
            )
    return inputs


def require_same_kernels(chosen: Kernels) -> None:
    """All ranks compute with the same kernels, since they train one model; a collective.

    Args:
        chosen: of this rank.

    Raises:
        InputError: they do not, where nodes have other packages or GPUs than others.
    """
    by_rank = distributed.gather_objects(chosen.values())
    for name in by_rank[0]:
        ranks: dict[Any, list[int]] = {}
        for rank, values in enumerate(by_rank):
            ranks.setdefault(values[name], []).append(rank)
        if len(ranks) > 1:
            found = ", ".join(f"{value} on ranks {ranges(which)}" for value, which in ranks.items())
            raise InputError(
                f"kernels.{name} comes to {found}: install the same packages on every node, or set it to one that all "
                "can run"
            )


def step_of(inputs: Inputs) -> int | None:
    """The step of the checkpoint that a rank would go on from."""
    return None if inputs.checkpoint is None else inputs.checkpoint.step


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
    again = distributed.of_main(may_requeue(out, done) if world.is_main else None)
    if again:
        return RequeueError(f"{out}: asked to stop, safe up to step {done}: start again with --resume auto to go on")
    return RunFailedError(
        f"{out}: asked to stop again before a single step was done, safe up to step {done}: no use in being requeued; "
        "give the job more time, or find out why starting takes so long"
    )
