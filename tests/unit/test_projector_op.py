"""The fused projector: its kernels, its op under autograd, compile and checkpointing, and the model that uses it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llara_dist.config import KernelsConfig, LoraConfig
from llara_dist.errors import InputError
from llara_dist.model.kernels import choose_kernels
from llara_dist.model.ops.projector import write_behaviour, write_behaviour_
from llara_dist.stream.batch import Batch, collate, empty_batch
from tests import models
from tests.projector_cases import CASES, Row, make_row
from tests.tiny import make_sample

triton = pytest.importorskip("triton")
INTERPRETER = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason="Triton's interpreter before 3.9 fails on NumPy 2.4",
)


@pytest.mark.long
@INTERPRETER
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-x", str(Path(__file__).parent / "projector_kernels.py")]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{2 * len(CASES)} passed" in done.stdout


def with_gradients(row: Row) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Leaves that require a gradient (embeddings, w1, b1, w2, b2), and the op's arguments between them."""
    leaves = [row.embeddings.clone().requires_grad_(), *(weight.clone().requires_grad_() for weight in row.weights)]
    return leaves, row.arguments[:4]


@pytest.mark.parametrize("name", ["no slot", "few items"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_op_is_registered_rightly(name: str, compute: torch.dtype) -> None:
    (embeddings, *weights), between = with_gradients(make_row(CASES[name], compute))
    torch.library.opcheck(
        torch.ops.llara_dist.write_behaviour.default, (embeddings, *between, *weights, compute), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_every_form_gives_the_same_row_and_gradients(autocast: bool) -> None:
    """Plain, in place, compiled whole, recomputed by checkpointing: all against index_copy of the projected items."""
    row = make_row(CASES["few items"], torch.float32)

    def plain(embeddings: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.gelu(torch.nn.functional.linear(row.item_table[row.unique_items], *weights[:2]))
        behaviour = torch.nn.functional.linear(hidden, *weights[2:])
        return embeddings.index_copy(0, row.item_slots, behaviour[row.slot_inverse].to(embeddings.dtype))

    def functional(embeddings: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return write_behaviour(embeddings, *row.arguments[:4], *weights)

    def in_place(embeddings: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return write_behaviour_(embeddings.detach().clone(), *row.arguments[:4], *weights)

    def checkpointed(*leaves: torch.Tensor) -> torch.Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(functional, *leaves, use_reentrant=False)

    def run(form: Any) -> tuple[torch.Tensor, ...]:
        leaves, _ = with_gradients(row)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            written = form(*leaves)
        return written.detach(), *torch.autograd.grad(written, leaves, row.gradient, allow_unused=True)

    expected = run(plain)
    forms = {
        "functional": functional,
        "in place": in_place,
        "checkpointed": checkpointed,
        "compiled": torch.compile(functional, fullgraph=True, backend="aot_eager"),
        "compiled in place": torch.compile(in_place, fullgraph=True, backend="aot_eager"),
    }
    for name, form in forms.items():
        for mine, truth in zip(run(form), expected, strict=True):
            if mine is None:
                assert "in place" in name
                continue
            # The order in which an item's slots are added may differ, and what is rounded between: a rounding is 2⁻⁹.
            tolerance = (2**-6 if autocast else 1e-5) * float(truth.abs().max())
            torch.testing.assert_close(mine, truth, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    "batch",
    [models.packed_row(), collate([make_sample(0)], [False]), empty_batch()],
    ids=["slots", "text-only", "empty"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_model_with_the_op_equals_the_eager_one(tmp_path: Path, batch: Batch, checkpointing: bool) -> None:
    """On a CPU the op computes by the reference, so whatever differs would be the way it is wired in."""
    models.write_shape(tmp_path, num_hidden_layers=2)
    model = models.build(tmp_path, {"bits": 32, "activation_checkpointing": checkpointing}, LoraConfig(dropout=0.0))
    found = {}
    for projector in ("eager", "triton"):
        model.kernels = dataclasses.replace(model.kernels, projector=projector)
        model.zero_grad()
        loss = model(batch)
        loss.backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(gradient is not None for gradient in trained.values())
        found[projector] = {"loss": loss.detach(), **trained}
    torch.testing.assert_close(found["triton"], found["eager"], rtol=1e-5, atol=1e-6)


def test_auto_falls_back_with_a_reason_and_a_wish_fails() -> None:
    chosen = choose_kernels(KernelsConfig(), torch.device("cpu"), torch.float32)
    assert chosen.projector == "eager"
    assert ("projector", "no GPU") in chosen.reasons
    with pytest.raises(InputError, match=r"kernels\.projector=triton: no GPU; use auto$"):
        choose_kernels(KernelsConfig(projector="triton"), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("stage", "dtype", "chosen"),
    [
        (0, torch.bfloat16, "triton"),
        (2, torch.float32, "triton"),
        (3, torch.bfloat16, "eager"),
        (0, torch.float16, "eager"),
    ],
)
def test_a_gpu_gets_the_kernels_unless_weights_are_partitioned(monkeypatch, stage, dtype, chosen) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernels = choose_kernels(KernelsConfig(attention="sdpa"), torch.device("cuda"), dtype, stage)
    assert kernels.projector == chosen
    assert ("projector" in dict(kernels.reasons)) == (chosen == "eager")


@pytest.mark.long
@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
@pytest.mark.parametrize("target", ["80", "90"])
def test_kernels_compile_without_spilling(tmp_path: Path, target: str, compute: str) -> None:
    """For a GPU that is not here: each kernel fits its registers (16 bytes may spill) and its shared memory."""
    folder = Path(__file__).parents[2]
    command = [sys.executable, "benchmarks/projector.py", "--compile_only", "--targets", target, "--compute", compute]
    environment = os.environ | {"PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    out = tmp_path / "kernels.json"
    subprocess.run([*command, "--out", str(out)], cwd=folder, env=environment, check=True, capture_output=True)
    kernels = json.loads(out.read_text())["kernels"]
    assert {kernel["kernel"] for kernel in kernels} == {"hidden", "output", "hidden_backward", "slot_sum"}
    for kernel in kernels:
        assert kernel["spilled"] <= 16, kernel
        assert kernel["shared"] <= {"80": 163, "90": 227}[target] * 1024, kernel
