"""The silent traps of ZeRO with a projector that is not always used, and steps that are not finite.

Each cure is taken out once, so that the test is known to see what it guards against.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llara_dist.config import CheckpointConfig, CurriculumConfig
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import Scenario, run_scenarios
from tests.distributed.training import train_all
from tests.runs import run_config

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
STEPS = 6
HELD = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def results(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every scenario under every stage on two ranks, in one process group."""
    folder = tmp_path_factory.mktemp("traps")
    scenarios = []
    for stage in STAGES:

        def make(name: str, stage: str = stage, **given: Any) -> Scenario:
            out = folder / f"{stage}-{name}"
            return Scenario(f"{stage}-{name}", run_config(inputs, out, stage, max_steps=STEPS), **given)

        # The first step is hybrid, the others are text-only: what moves the projector then is momentum alone.
        scenarios.append(make("text", hybrid=(0,)))
        # The projector is held in steps that are text-only, after a step that gave it momentum.
        scenarios.append(make("held", hybrid=(0,), held=(1, 2, 3)))
        # It is held from the start, as in the first phase of two-stage tuning.
        scenarios.append(make("idle", hybrid=(4, 5), held=HELD))
        scenarios.append(make("idle-without-cure", hybrid=(4, 5), held=HELD, uncured="moments"))
        hybrid = tuple(range(STEPS))
        scenarios.append(make("loss", hybrid=hybrid, poison=(2, "loss")))
        scenarios.append(make("gradient", hybrid=hybrid, poison=(2, "gradient")))
        scenarios.append(make("left-out", hybrid=hybrid, left_out=(2,)))
    scenarios.append(
        Scenario(
            "zero3-text-without-cure",
            run_config(inputs, folder / "without-cure", "zero3", max_steps=STEPS),
            hybrid=(0,),
            uncured="projector",
        )
    )
    run_ranks(run_scenarios, 2, folder / "ranks", scenarios, folder)
    return folder


def projector(folder: Path, name: str, step: int, kind: str = "") -> dict[str, Tensor]:
    prefix = f"{step}/{kind}projector."
    found = {
        n.removeprefix(prefix): t for n, t in load_file(folder / f"{name}.safetensors").items() if n.startswith(prefix)
    }
    assert len(found) == 4
    return found


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_text_only_steps_give_the_projector_zero_gradients_not_the_last_ones(results: Path, stage: str) -> None:
    for step in range(STEPS):
        expected, found = (projector(results, f"{s}-text", step) for s in ("zero0", stage))
        assert distance(expected, found) < 1e-6, step


def test_without_the_cure_zero3_applies_the_last_gradient_again(results: Path) -> None:
    expected, found = (projector(results, f"zero3-text{cure}", STEPS - 1) for cure in ("", "-without-cure"))
    assert distance(expected, found) > 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_happens_to_be_text_only_is_an_ordinary_step(results: Path, stage: str) -> None:
    """Momentum goes on moving the projector, and Adam counts the step."""
    assert distance(projector(results, f"{stage}-text", 0), projector(results, f"{stage}-text", 1)) > 1e-5
    assert set(map(float, projector(results, f"{stage}-text", 3, "step/").values())) == {4.0}


@pytest.mark.parametrize("stage", STAGES)
def test_a_held_projector_does_not_move_at_all(results: Path, stage: str) -> None:
    begin = projector(results, f"{stage}-held", 0)
    for step in (1, 2, 3):
        assert distance(begin, projector(results, f"{stage}-held", step)) == 0.0
    idle = [projector(results, f"{stage}-idle", step) for step in range(STEPS)]
    assert distance(idle[0], idle[3]) == 0.0
    assert distance(idle[3], idle[4]) > 0.0


@pytest.mark.parametrize("stage", STAGES)
def test_adam_counts_from_the_first_hybrid_step(results: Path, stage: str) -> None:
    steps = [set(map(float, projector(results, f"{stage}-idle", step, "step/").values())) for step in range(STEPS)]
    assert steps == [{0.0}, {0.0}, {0.0}, {0.0}, {1.0}, {2.0}]
    moved = {}
    for name in ("idle", "idle-without-cure"):
        before, after = (projector(results, f"{stage}-{name}", step)["output.bias"] for step in (3, 4))
        moved[name] = (after - before).abs()
    # Adam's first update is the learning rate in every element whose gradient is not tiny, whatever its size.
    assert float(moved["idle"].median()) == pytest.approx(2e-3, rel=1e-3)
    assert float(moved["idle-without-cure"].median()) < 1.5e-3


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_is_skipped_as_if_it_had_not_been(results: Path, stage: str, what: str) -> None:
    found, expected = (load_file(results / f"{stage}-{name}.safetensors") for name in (what, "left-out"))
    for name, value in found.items():
        step, _, parameter = name.partition("/")
        before = found[f"1/{parameter}"] if step == "2" else expected[name]
        assert torch.equal(value, before), name


def test_a_two_stage_run_holds_the_projector_until_its_first_hybrid_step(inputs: Path, tmp_path: Path) -> None:
    """Through the loop, the schedule and the checkpoints; a run that is resumed in the idle phase is the same."""
    configs = []
    for name, stage in (("whole", "zero1"), ("resumed", "zero3")):
        made = run_config(inputs, tmp_path / name, stage, max_steps=8)
        schedule = CurriculumConfig(schedule="two_stage", switch=0.5)
        saving = CheckpointConfig(every_steps=1, keep_last=9)
        configs.append(dataclasses.replace(made, curriculum=schedule, checkpoint=saving))
    run_ranks(train_all, 2, tmp_path / "ranks-whole", configs[:1])
    first = tmp_path / "whole" / "checkpoints" / "step-00000002"
    shutil.copytree(first, tmp_path / "resumed" / "checkpoints" / first.name)
    run_ranks(train_all, 2, tmp_path / "ranks-resumed", [dataclasses.replace(configs[1], resume="auto")])

    def saved(name: str, step: int) -> dict[str, Tensor]:
        return load_file(tmp_path / name / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors")

    for name in ("whole", "resumed"):
        begin = saved("whole", 1)
        for step in range(3, 9):
            now = saved(name, step)
            for key in (key for key in now if ".".join(key.split("/")[1:]).startswith("projector.")):
                kind = key.partition("/")[0]
                if kind == "step":
                    assert float(now[key]) == max(0, step - 4)
                elif step <= 4:
                    assert torch.equal(now[key], begin[key]), (name, step, key)
                elif kind == "master":
                    assert not torch.equal(now[key], begin[key]), (name, step, key)
            assert float(now["step/" + next(k for k in now if "lora_A" in k).partition("/")[2]]) == step
    for key, value in saved("whole", 8).items():
        assert (saved("resumed", 8)[key] - value).norm() / value.norm().clamp_min(1e-12) < 1e-4, key
