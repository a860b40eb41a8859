"""What can be tried here: the values of each field that this machine can run."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

from llara_dist.autotune.found import Trial
from llara_dist.autotune.settings import RECOMPUTE, Question, Setting, label
from llara_dist.config import KernelsConfig, RunConfig
from llara_dist.errors import FindingsError
from llara_dist.model.kernels import Choose, Kernels

ORDER = ("attention", "lora", "layers", "projector", "last_layer")
"""fields of KernelsConfig, those first of which most is expected; `compile` comes last, since it takes longest"""


def start_of(config: RunConfig, choose: Choose) -> Setting:
    """The run's own settings, with what `auto` comes to here.

    Args:
        config: the run.
        choose: of kernels.

    Raises:
        InputError: a kernel that the run names cannot run here.
    """
    # On a GPU `fit_device` has decided what auto is; on the CPU it is none.
    recompute = config.model.activation_checkpointing
    recompute = False if recompute == "auto" else recompute
    return Setting(config.data.max_tokens_per_microbatch, recompute, by_name(choose(config.kernels)))


def by_name(chosen: Kernels) -> KernelsConfig:
    """What was chosen, as what would be asked for."""
    return KernelsConfig(**chosen.values())


def fewer_recomputed(recompute: bool | int) -> tuple[bool | int, ...]:
    """What may be faster than what a run recomputes: nothing, and of a number of layers half as many."""
    if not recompute:
        return ()
    return (False,) if recompute is True or recompute == 1 else (False, recompute // 2)


def questions_for(start: Setting, choose: Choose) -> tuple[list[Question], list[Trial]]:
    """What to try beside the start, and what cannot run here, with the reason.

    Args:
        start: what `start_of` made of it.
        choose: of kernels.
    """
    hints = get_type_hints(KernelsConfig)
    questions: list[Question] = []
    impossible: list[Trial] = []

    def ask(name: str, values: tuple[Any, ...]) -> None:
        possible = []
        for value in values:
            asked, what = start.having(name, value).kernels, label(name, value)
            try:
                chosen = by_name(choose(asked))
            except FindingsError as error:
                reason = error.errors[0].found.partition(": ")[2]
                impossible.append(Trial(what, start.tokens, None, None, None, f"not here: {reason}"))
                continue
            if chosen == asked and chosen != start.kernels:
                possible.append(value)
        if possible:
            questions.append(Question(name, tuple(possible)))

    for name in ORDER:
        ask(name, tuple(value for value in get_args(hints[name]) if value != "auto"))
    if fewer := fewer_recomputed(start.recompute):
        questions.append(Question(RECOMPUTE, fewer))
    ask("compile", (not start.kernels.compile,))
    return questions, impossible
