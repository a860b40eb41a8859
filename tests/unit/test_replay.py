"""What a run's folder tells of a step, and where a value that is not finite came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llara_dist.config import KernelsConfig, LoraConfig, RunConfig
from llara_dist.replay.command import warn_of_masks
from llara_dist.replay.history import Layout, Past, layout_of, start_of
from llara_dist.replay.inspection import inspect_microbatch
from llara_dist.replay.report import by_loss
from llara_dist.supervision.restarts import Start
from tests.models import build, packed_row, write_shape


def start(first_step: int, nodes: tuple[int, ...] = (), tokens: int = 0) -> Start:
    return Start("7", 0, first_step, "then", nodes, tokens)


def state(step: int, hosts: dict[str, int], tokens: int = 600) -> dict[str, Any]:
    return {
        "step": step,
        "world_size": sum(hosts.values()),
        "hosts": {name: {"ranks": ranks, "devices": ["cpu"]} for name, ranks in hosts.items()},
        "config": {"data": {"max_tokens_per_microbatch": tokens}},
    }


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), min_size=1, max_size=8))
def test_a_logged_step_is_of_the_start_that_logged_it(lives: list[tuple[int, int]]) -> None:
    """Each start goes on from a step that is done, drops the log from there on, and gets some steps further."""
    starts: list[Start] = []
    log: list[Start] = []
    for wanted, steps in lives:
        begun = start(min(wanted, len(log)), (len(starts) + 1,))
        starts.append(begun)
        log[begun.first_step :] = [begun] * steps
    for step, by in enumerate(log):
        assert start_of(step, starts) is by


def test_a_step_before_every_start_has_none() -> None:
    assert start_of(3, [start(4)]) is None
    assert start_of(3, []) is None


def test_what_the_start_recorded_goes_first() -> None:
    starts = [start(0, (8, 8), 4096), start(100, (4,), 8192)]
    states = [state(50, {"a": 3}), state(150, {"a": 5})]
    assert layout_of(99, starts, states) == Layout((8, 8), 4096, "the start of then")
    assert layout_of(100, starts, states) == Layout((4,), 8192, "the start of then")
    assert layout_of(100, starts, states).world_size == 4  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(("by_node", "nodes"), [(False, (5,)), (True, (2, 3))])
def test_an_older_run_is_told_from_the_first_checkpoint_after_the_step(by_node: bool, nodes: tuple[int, ...]) -> None:
    states = [state(50, {"a": 1}), state(100, {"b": 2, "a": 3}, 700), state(150, {"a": 9})]
    assert layout_of(50, [start(0)], states, by_node) == Layout(nodes, 700, "the checkpoint of step 100")
    assert layout_of(99, [start(0)], states, by_node) == Layout(nodes, 700, "the checkpoint of step 100")
    assert layout_of(150, [start(0)], states) == Layout((9,), 600, "the checkpoint of step 150")
    assert layout_of(5, [start(0)], []) is None


def test_what_drew_the_dropout_is_what_the_start_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    asked = KernelsConfig(attention="sdpa")
    older, fused = start(2), Start("7", 0, 4, "then", kernels={"lora": "fused", "last_layer": "answers"})
    compiled = Start("7", 0, 6, "then", kernels={"lora": "fused", "last_layer": "answers", "compile": True})
    past = Past(Path("run"), RunConfig(kernels=asked), [older, fused, compiled], [], {})
    drawn = {step: past.kernels(step) for step in range(8)}
    assert drawn[0] == asked  # nothing tells of any start
    assert drawn[3] == KernelsConfig(attention="sdpa", lora="peft", last_layer="all")
    assert drawn[5] == KernelsConfig(attention="sdpa", lora="fused", last_layer="answers")
    assert drawn[7] == KernelsConfig(attention="sdpa", lora="fused", last_layer="answers", compile=True)
    warn_of_masks([drawn[4], drawn[5]], drawn[5])
    assert capsys.readouterr().err == ""
    warn_of_masks([drawn[3], drawn[4], drawn[6]], drawn[4])
    first, second, third = capsys.readouterr().err.splitlines()
    assert "the run was compiled" in first
    assert "kernels.lora was peft in steps that are computed here with fused" in second
    assert "kernels.last_layer was all in steps that are computed here with answers" in third


def inspect(folder: Path, poison: str = "", per_sample: bool = False) -> tuple[Any, Any]:
    write_shape(folder)
    model, batch = build(folder, {"bits": 32}, LoraConfig(dropout=0.0)), packed_row(3)
    parameters = model.lora_parameters() | model.projector_parameters()
    with torch.no_grad():
        for name, value in parameters.items():
            if name.endswith(poison) and poison:
                value.fill_(torch.nan)
            elif "lora_B" in name:
                value.normal_(generator=torch.Generator().manual_seed(1), std=0.02)
    return inspect_microbatch(model, list(parameters.values()), batch, (3, 1), 50, torch.device("cpu"), per_sample)


def test_samples_add_up_to_the_microbatch(tmp_path: Path) -> None:
    result, gradients = inspect(tmp_path, per_sample=True)
    assert result.problem == ""
    assert (result.rank, result.microbatch, len(result.samples)) == (3, 1, 3)
    assert sum(each.loss * each.answer_tokens for each in result.samples) == pytest.approx(result.loss_sum, rel=1e-5)
    assert sum(each.tokens for each in result.samples) == result.tokens
    assert all(each.slots > 0 for each in result.samples)
    assert sum(each.slots for each in result.samples) == packed_row(3).slot_positions.numel()
    assert torch.nn.utils.get_total_norm(gradients) == pytest.approx(result.grad_norm, rel=1e-6)
    assert result.grad_norm <= sum(each.grad_norm for each in result.samples) * (1 + 1e-5)


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_module_is_named_whose_output_is_not_finite(tmp_path: Path, per_sample: bool) -> None:
    result, gradients = inspect(tmp_path, "layers.1.mlp.up_proj.lora_A.default.weight", per_sample)
    assert result.problem.startswith("output of llm.")
    assert result.problem.endswith("layers.1.mlp.up_proj")  # whose fused op computes with its adapter's weights
    assert gradients is None
    assert result.loss_sum is None
    assert result.grad_norm is None
    assert not any(each.is_finite for each in result.samples)


def test_samples_that_are_not_finite_stand_first(tmp_path: Path) -> None:
    result, _ = inspect(tmp_path / "sound")
    bad, _ = inspect(tmp_path / "poisoned", "layers.0.self_attn.q_proj.lora_B.default.weight")
    ordered = by_loss([*result.samples, bad.samples[0]])
    assert ordered[0] is bad.samples[0]
    assert [each.loss for each in ordered[1:]] == sorted((each.loss for each in result.samples), reverse=True)
