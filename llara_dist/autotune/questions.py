"""What can be tried here: the values of each field that this machine can run."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

import torch

from llara_dist.autotune.search import RECOMPUTE, Question, Setting, Trial, label
from llara_dist.config import KernelsConfig, RunConfig
from llara_dist.errors import InputError
from llara_dist.model.kernels import Kernels, choose_kernels

ORDER = ("attention", "lora", "layers", "projector", "last_layer")
"""fields of KernelsConfig, those first of which most is expected; `compile` comes last, since it takes longest"""


def start_of(config: RunConfig, device: torch.device, dtype: torch.dtype, stage: int) -> Setting:
    """The run's own settings, with what `auto` comes to here.

    Args:
        config: the run.
        device: to measure on.
        dtype: what matrix products run in.
        stage: of ZeRO.

    Raises:
        InputError: a kernel that the run names cannot run here.
    """
    chosen = by_name(choose_kernels(config.kernels, device, dtype, stage))
    # On a GPU `fit_device` has decided what auto is; on the CPU it is none.
    recompute = config.model.activation_checkpointing
    return Setting(config.data.max_tokens_per_microbatch, False if recompute == "auto" else recompute, chosen)


def by_name(chosen: Kernels) -> KernelsConfig:
    """What was chosen, as what would be asked for."""
    names = [item.name for item in dataclasses.fields(KernelsConfig)]
    return KernelsConfig(**{name: getattr(chosen, name) for name in names})


def questions_for(
    config: RunConfig, start: Setting, device: torch.device, dtype: torch.dtype, stage: int
) -> tuple[list[Question], list[Trial]]:
    """What to try beside the start, and what cannot run here, with the reason.

    Args:
        config: the run.
        start: what `start_of` made of it.
        device: to measure on.
        dtype: what matrix products run in.
        stage: of ZeRO.
    """
    hints = get_type_hints(KernelsConfig)
    questions: list[Question] = []
    impossible: list[Trial] = []

    def ask(name: str, values: tuple[Any, ...]) -> None:
        possible = []
        for value in values:
            asked = start.having(name, value).kernels
            try:
                chosen = by_name(choose_kernels(asked, device, dtype, stage))
            except InputError as error:
                impossible.append(Trial(f"{label(name)}={value}", start.tokens, None, None, None, f"not here: {error}"))
                continue
            if chosen == asked and chosen != start.kernels:
                possible.append(value)
        if possible:
            questions.append(Question(name, tuple(possible)))

    for name in ORDER:
        if name != "attention" or config.model.attention == "packed":
            ask(name, tuple(value for value in get_args(hints[name]) if value != "auto"))
    if start.recompute is not False:
        questions.append(Question(RECOMPUTE, (False,)))
    ask("compile", (not start.kernels.compile,))
    return questions, impossible
