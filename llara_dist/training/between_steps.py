"""What may follow an optimizer step: checkpoint and validation, in an order that loses nothing when it is cut short."""

from __future__ import annotations

from typing import NoReturn

from llara_dist.errors import RequeueError
from llara_dist.supervision.progress import Phase
from llara_dist.training.metrics_log import MetricsLog
from llara_dist.training.run import Run


class StoppedError(RequeueError):
    """A rank was asked to stop; what the run's checkpoints hold goes as far as `done` steps.

    Args:
        done: optimizer steps.
    """

    def __init__(self, done: int) -> None:
        super().__init__(f"stopped after step {done}")
        self.done = done


def conclude(run: Run, log: MetricsLog, done: int) -> float:
    """What follows `done` steps: a checkpoint and a validation, where they are due.

    A checkpoint that is due does not wait for a validation, which may take long: it is written beside it, with the
    validation still owed, and once more if that ends the run or finds it better than ever.

    Returns:
        Seconds that saving held up the steps.
    """
    blocked_s, due = 0.0, run.validations.due(done)
    if run.checkpoint_due(done) and not (due and done == run.total_steps):
        run.validations.put_off(done)
        run.engine.phases.enter(Phase.CHECKPOINT, done - 1)
        blocked_s = run.save(done).blocked_s
    return blocked_s + validate(run, log, done) if due else blocked_s


def stop(run: Run, done: int) -> NoReturn:
    """End the run after `done` steps because a rank was asked to: saved, with the validation that is due still owed.

    Raises:
        StoppedError: always.
        InputError: the checkpoint could not be written.
    """
    run.validations.put_off(done)
    run.engine.phases.enter(Phase.CHECKPOINT, done - 1)
    run.save(done, required=True)
    raise StoppedError(done)


def validate(run: Run, log: MetricsLog, done: int) -> float:
    """Validate after `done` steps, and save what that changes: a new best, or the run's end.

    Returns:
        Seconds that saving held up the steps.

    Raises:
        StoppedError: a rank was asked to stop in the middle; the validation is owed, and a checkpoint is written.
    """
    phases, validations = run.engine.phases, run.validations
    phases.enter(Phase.VALIDATION, done - 1)
    found = validations.validate(run.engine, done)
    phases.enter(Phase.CHECKPOINT, done - 1)
    if found is None:
        stop(run, done)
    scores, is_best = found
    log.write_validation(scores, is_best)
    if is_best or validations.exhausted or done == run.total_steps:
        return run.save(done, scores if is_best else None, required=validations.exhausted).blocked_s
    return 0.0
