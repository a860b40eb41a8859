"""Liger's kernels and torch.compile in the decoder layers: the same numbers, and no other model changed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llara_dist import distributed
from llara_dist.config import KernelsConfig, LoraConfig
from llara_dist.errors import InputError
from llara_dist.model import layers as layers_module
from llara_dist.model.kernels import choose_kernels
from llara_dist.training.preflight.examine import open_inputs
from llara_dist.training.run import open_run
from tests.models import write_shape
from tests.runs import ROOT, run_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.long
def test_ligers_kernels_give_the_gradients_of_transformers_own(tmp_path: Path) -> None:
    """Interpreted on the CPU: with 4-bit weights, adapters, dropout, packed attention and a recomputed layer."""
    pytest.importorskip("liger_kernel")
    write_shape(tmp_path, num_hidden_layers=2)
    command = [sys.executable, "-m", "tests.unit.liger_interpreted", str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for name, found in told["gradients"].items():
        # A few roundings in each of two layers, one after the other.
        assert max(found["errors"]) < 32 * torch.finfo(torch.float32).eps, name
        assert found["differs"], f"{name}: to the last bit the same numbers; Liger's kernels did not run"
    for found, expected in told["saved"]:
        assert expected == pytest.approx(found, rel=0.01)


def test_liger_is_chosen_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(asked: str, device: torch.device, found: bool = True) -> tuple[str, str]:
        monkeypatch.setattr("llara_dist.model.kernels.find_spec", lambda name: found or None)
        config = KernelsConfig(attention="sdpa", projector="eager", lora="peft", layers=asked)  # pyright: ignore
        kernels = choose_kernels(config, device, torch.bfloat16)
        return kernels.layers, dict(kernels.reasons).get("layers", "")

    assert chosen("torch", GPU) == ("torch", "")
    assert chosen("auto", GPU) == ("liger", "")
    assert chosen("auto", CPU) == ("torch", "no GPU")
    assert chosen("auto", GPU, found=False) == ("torch", "liger_kernel is not installed")
    with pytest.raises(InputError, match=r"kernels.layers=liger: no GPU; use auto$"):
        chosen("liger", CPU)
    with pytest.raises(InputError, match=r"kernels.layers=liger: liger_kernel is not installed"):
        chosen("liger", GPU, found=False)


def test_layers_are_not_compiled_under_zero_3() -> None:
    with pytest.raises(InputError, match=r"kernels.compile=true: ZeRO-3 gathers parameters"):
        choose_kernels(KernelsConfig(compile=True), CPU, torch.float32, zero_stage=3)


def test_layers_are_not_compiled_on_a_gpu_where_triton_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llara_dist.model.kernels._has_no_cpp_compiler", lambda: False)
    config = KernelsConfig("sdpa", "eager", "peft", "torch", compile=True)
    monkeypatch.setattr("llara_dist.model.kernels._triton_lacks", lambda: "")
    assert choose_kernels(config, GPU, torch.bfloat16).compile
    monkeypatch.setattr("llara_dist.model.kernels._triton_lacks", lambda: "triton finds no C compiler")
    assert choose_kernels(config, CPU, torch.float32).compile
    with pytest.raises(InputError, match=r"kernels.compile=true: triton finds no C compiler; use false$"):
        choose_kernels(config, GPU, torch.bfloat16)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["zero0", "zero2"])
def test_compiled_layers_train_as_eager_ones_and_are_not_compiled_again(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Through DeepSpeed, with NF4, adapters, dropout and one of two layers recomputed; every row has another length."""
    from torch._dynamo.utils import counters

    # Without the code generator, which takes minutes and draws dropout's numbers in another order.
    compile_layers = layers_module.compile_layers
    monkeypatch.setattr(layers_module, "compile_layers", lambda model: compile_layers(model, backend="aot_eager"))
    world = distributed.World()
    distributed.initialise(world, CPU)
    losses, weights, names = [], [], []
    try:
        for compiled in (False, True):
            config = run_config(inputs, tmp_path / f"{compiled}", stage, max_steps=2)
            config = dataclasses.replace(
                config,
                lora=LoraConfig(dropout=0.1),
                model=dataclasses.replace(config.model, activation_checkpointing=1),
                kernels=KernelsConfig(compile=compiled),
            )
            torch._dynamo.reset()
            counters.clear()
            run = open_run(config, open_inputs(config, world), world, CPU)
            steps = list(run.loader)
            assert len({batch.num_tokens for step in steps for batch in step.microbatches}) > 2
            losses.append([])
            for step in steps:
                graphs = counters["stats"]["unique_graphs"]
                losses[-1].append(run.engine.train_step(step, *run.rates(step.index)).loss)
            weights.append([parameter.detach().clone() for parameter in run.engine.parameters.values()])
            names.append(list(run.engine.model.state_dict()))
        assert counters["stats"]["unique_graphs"] == graphs > 0
        assert all("packed_attention" in reason for reason in counters["graph_break"])
    finally:
        distributed.shut_down()
        torch._dynamo.reset()
    assert names[0] == names[1]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-5)  # AdamW makes much of little gradients
