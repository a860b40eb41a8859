"""What a run's folder tells of its steps: settings, ranks, checkpoints, the log. It is read, never written."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llara_dist.config import KernelsConfig, RunConfig, run_config_from_dict
from llara_dist.console import say
from llara_dist.errors import InputError
from llara_dist.integrity import read_json
from llara_dist.supervision.restarts import Start, read_starts
from llara_dist.training.checkpoints.checkpoint import (
    MARKER,
    STATE,
    Checkpoint,
    checkpoint_folders,
    newest_checkpoint,
    open_checkpoint,
)
from llara_dist.training.contract import differences
from llara_dist.training.metrics_log import read_metrics


@dataclass(frozen=True)
class Layout:
    """How the rows of a step are shared out.

    Attributes:
        nodes: ranks of each group that shares rows out among itself, in the order of ranks; see `Start`.
        max_tokens_per_microbatch: budget of a packed row.
        known_from: what says so, for people.
    """

    nodes: tuple[int, ...]
    max_tokens_per_microbatch: int
    known_from: str

    @property
    def world_size(self) -> int:
        """Ranks."""
        return sum(self.nodes)


@dataclass(frozen=True)
class Past:
    """What was found in a run's folder.

    Attributes:
        run: the folder.
        config: the settings with which the run was last started.
        starts: oldest first.
        states: state.json of its complete checkpoints, by step.
        rows: of metrics.jsonl, by step.
        world: ranks of each node to take in place of those that were; () = those that were.
    """

    run: Path
    config: RunConfig
    starts: list[Start]
    states: list[dict[str, Any]]
    rows: dict[int, dict[str, Any]]
    world: tuple[int, ...] = ()

    @classmethod
    def read(cls, run: Path, world: Sequence[int] = ()) -> Past:
        """Read a run's folder; the run may be writing into it.

        Raises:
            InputError: the folder is no run's, or its config.json is damaged.
        """
        rows = {row["step"]: row for row in read_metrics(run / "metrics.jsonl")}
        return cls(run, _read_settings(run), read_starts(run), _saved_states(run), rows, tuple(world))

    def layout(self, step: int, by_node: bool = False) -> Layout:
        """How a step was shared out.

        Args:
            step: optimizer step.
            by_node: as in `layout_of`.

        Raises:
            InputError: nothing says so.
        """
        found = layout_of(step, self.starts, self.states, by_node)
        if self.world:
            budget = self.config.data.max_tokens_per_microbatch if found is None else found.max_tokens_per_microbatch
            return Layout(self.world, budget, "--world")
        if found is None:
            raise InputError(
                f"{self.run}: neither starts.jsonl nor a checkpoint says on how many ranks step {step} ran; "
                "give --world"
            )
        return found

    def kernels(self, step: int) -> KernelsConfig:
        """The run's settings, with what its start recorded in place of what decides over a step's dropout masks.

        Runs of before there was anything to choose recorded nothing: PEFT computed their adapters, and every position
        of the last layer was computed.

        Args:
            step: optimizer step.
        """
        start = start_of(step, self.starts)
        if start is None:
            return self.config.kernels
        drawn = {"lora": "peft", "last_layer": "all", "compile": False}
        recorded = {name: start.kernels.get(name, older) for name, older in drawn.items()}
        return dataclasses.replace(self.config.kernels, **recorded)

    def require_same(self, contract: dict[str, Any]) -> None:
        """The run's inputs are still those that it was made with.

        Args:
            contract: of the inputs as they are now, `contract_of`.

        Raises:
            InputError: names what is another one.
        """
        changed = differences(self.states[-1]["contract"], contract) if self.states else []
        if changed:
            raise InputError(
                f"{self.run}: its inputs are not those of the run any more: {', '.join(changed)}; put back what "
                f"{self.run / 'config.json'} names"
            )

    def logged(self, step: int) -> dict[str, float | None] | None:
        """Loss and gradient norm of a step as metrics.jsonl has them; None where it has no line of the step."""
        row = self.rows.get(step)
        return None if row is None else {"loss": row["loss"], "grad_norm": row["grad_norm"]}


def _read_settings(run: Path) -> RunConfig:
    path = run / "config.json"
    values = read_json(path, "the settings of a run, in the folder that `llara-dist train` made")
    try:
        return run_config_from_dict(values)
    except (InputError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no settings of a run ({error}); give the folder of a run as --run") from None


def _saved_states(run: Path) -> list[dict[str, Any]]:
    states = []
    for folder in checkpoint_folders(run / "checkpoints"):
        if (folder / MARKER).is_file():
            with contextlib.suppress(InputError, OSError):  # it is being removed at this moment
                states.append(read_json(folder / STATE, "a checkpoint's state"))
    return states


def start_of(step: int, starts: Sequence[Start]) -> Start | None:
    """The start in which a step was last computed; None where none can have been.

    A start drops what was logged of steps that it computes again, so that it is the last one that began early enough.

    Args:
        step: optimizer step.
        starts: oldest first.
    """
    return next((start for start in reversed(starts) if start.first_step <= step), None)


def layout_of(
    step: int, starts: Sequence[Start], states: Sequence[dict[str, Any]], by_node: bool = False
) -> Layout | None:
    """How a step was shared out; None where nothing says so.

    What the step's start recorded; where it is of an older version what the first checkpoint after the step says, else
    the last one before it.

    Args:
        step: optimizer step.
        starts: of the run, oldest first.
        states: of its checkpoints, by step.
        by_node: whether nodes have their own copies of the shards; only asked where the start recorded nothing.
    """
    start = start_of(step, starts)
    state = next((state for state in states if state["step"] > step), states[-1] if states else None)
    if start is not None and start.nodes:
        return Layout(start.nodes, start.max_tokens_per_microbatch, f"the start of {start.time}")
    if state is None:
        return None
    nodes = [host["ranks"] for host in state["hosts"].values()] if by_node else [state["world_size"]]
    budget = state["config"]["data"]["max_tokens_per_microbatch"]
    return Layout(tuple(nodes), budget, f"the checkpoint of step {state['step']}")


def find_checkpoint(run: Path, which: str, step: int) -> Checkpoint | None:
    """The checkpoint to begin with; None = the run's initial weights.

    Args:
        run: the run's folder.
        which: auto = the newest complete one that is not after the step, if any; latest = the newest; or the name or
            number of one: step-00000300, 300.
        step: optimizer step that is wanted.

    Raises:
        InputError: there is no such checkpoint, or it is damaged.
    """
    folder = run / "checkpoints"
    if which == "latest":
        newest = newest_checkpoint(folder)
        if newest is None:
            raise InputError(f"{folder}: no complete checkpoint; use --checkpoint auto for the initial weights")
        return newest
    by_number = {int(path.name.removeprefix("step-")): path for path in checkpoint_folders(folder)}
    if which == "auto":
        for number in sorted((number for number in by_number if number <= step), reverse=True):
            try:
                return open_checkpoint(by_number[number])
            except (InputError, OSError) as error:
                say(f"passing over a checkpoint: {error}")
        return None
    wanted = which.removeprefix("step-")
    if not wanted.isdecimal() or int(wanted) not in by_number:
        there = ", ".join(path.name for path in by_number.values()) or "none"
        raise InputError(f"--checkpoint {which}: not in {folder}; there are: {there}; or give auto or latest")
    return open_checkpoint(by_number[int(wanted)])
