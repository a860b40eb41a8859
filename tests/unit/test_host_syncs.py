"""How often a training step reads a device tensor on the host: never in a micro-batch, once an optimizer step."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llara_dist
from llara_dist import distributed
from llara_dist.config import LoraConfig
from llara_dist.model import fused_lora
from llara_dist.model.ops.lora import draw_seed
from llara_dist.supervision.progress import Phase
from llara_dist.training.preflight.examine import open_inputs
from llara_dist.training.run import open_run
from llara_dist.training.step_metrics import StepMetrics
from tests.runs import run_config

READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
OPS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}
OURS = str(Path(llara_dist.__file__).parent)
ON_THE_HOST = ("torch/optim/", "bitsandbytes/backends/cpu/")
"""AdamW's step counts lie on the host; bitsandbytes' CPU kernels are not those of a GPU"""


class Reads(TorchDispatchMode):
    """Counts reads by (phase, whether this package's own code makes them); on a GPU each would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.phase: Phase | None = None
        self.found: collections.Counter[tuple[Phase | None, str]] = collections.Counter()
        self._within = False
        self._seeds: dict[int, torch.Tensor] = {}

    def draw_seed(self) -> torch.Tensor:
        """Dropout's seeds are drawn and read on the host: a read of one is not counted."""
        seed = draw_seed()
        self._seeds[seed.data_ptr()] = seed
        return seed

    def count(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.data_ptr() in self._seeds:
            return
        stack = [frame.filename for frame in traceback.extract_stack()[:-2]]
        callers = [file for file in stack if file not in (__file__,) and "_python_dispatch" not in file]
        if any(place in callers[-1] for place in ON_THE_HOST):
            return
        whose = next(file for file in reversed(callers) if "/torch/" not in file)
        self.found[self.phase, f"{'ours' if whose.startswith(OURS) else whose} {name}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in OPS and not self._within:
            self.count(func._schema.name, args[0])
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Python-level reads are counted as well: of a CPU tensor they are no operation that dispatch sees."""
        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(fused_lora, "draw_seed", self.draw_seed)
            for name in READS:
                patch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))
            yield

    def _counted(self, name: str, original: Any) -> Any:
        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            within, self._within = self._within, True
            if not within:
                self.count(name, tensor)
            try:
                return original(tensor, *args, **kwargs)
            finally:
                self._within = within

        return read


def summed_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """What autograd adds to a parameter's gradient from here on, whatever DeepSpeed does with it."""
    total = torch.zeros_like(parameter)

    def add(gradient: torch.Tensor) -> None:
        total.add_(gradient)

    parameter.register_hook(add)
    return total


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2"])
def test_a_step_reads_the_device_once_and_a_microbatch_never(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    world = distributed.World()
    config = run_config(inputs, tmp_path / "run", stage, max_steps=2)
    config = dataclasses.replace(config, lora=LoraConfig(dropout=0.1))
    device = torch.device("cpu")
    distributed.initialise(world, device)
    try:
        run = open_run(config, open_inputs(config, world), world, device)
        reads = Reads()
        steps = list(run.loader)
        assert max(len(step.microbatches) for step in steps) > 1
        run.engine.train_step(steps[0], 1e-3, 1e-3)  # what is made once, e.g. AdamW's moments

        enters = run.engine.phases.enter

        def enter(phase: Phase, *rest: Any) -> None:
            reads.phase = phase
            enters(phase, *rest)

        monkeypatch.setattr(run.engine.phases, "enter", enter)
        gradients = [summed_gradient(parameter) for parameter in run.engine.parameters.values()]
        with reads.patched():
            result = run.engine.train_step(steps[1], 1e-3, 1e-3, votes=(False, True))
        assert reads.found == {(Phase.REDUCE, "ours tolist"): 1}
        assert result.votes == (False, True)
        norm = float(torch.nn.utils.get_total_norm(gradients))
        assert result.grad_norm == pytest.approx(norm, rel=1e-5)
        assert norm > 0

        # A row of metrics.jsonl, where DeepSpeed alone knows the norm: it is read once.
        logged, metrics = Reads(), StepMetrics(run)
        told = dataclasses.replace(result, norm=torch.tensor(2.0))
        with logged.patched():
            row = metrics.row(steps[1], told, wait_s=0.0, step_s=1.0)
        assert row["grad_norm"] == 2.0
        assert logged.found == {(None, "ours __float__"): 1}
    finally:
        distributed.shut_down()
