"""The gradients' norm and clipping by it, of plain tensors, against PyTorch's own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from llara_dist.ds_config import read_ds_config
from llara_dist.training.clipping import Clipping
from tests.runs import ROOT

CPU = torch.device("cpu")
ZERO0, ZERO1 = (read_ds_config(ROOT / "ds_configs" / f"zero{stage}.json") for stage in range(2))


def parameters() -> list[nn.Parameter]:
    """Two parameters with gradients, and one without."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape)) for shape in ((6, 4), (10,), (3,))]
    for parameter in made[:2]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def flat(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors if tensor is not None])


def held(clipping: Clipping, stage: int) -> list[list[Tensor]]:
    """What two ranks hold: each all gradients under stage 0, under stage 1 its half of every one."""
    if stage == 0:
        return [clipping.gradients(None, parameters()) for _ in range(2)]
    halves = zip(*(p.grad.flatten().chunk(2) for p in parameters() if p.grad is not None), strict=True)
    partitions = [SimpleNamespace(averaged_gradients={0: [first], 1: [second]}) for first, second in halves]
    return [clipping.gradients(partition, []) for partition in partitions]


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0], ids=["off", "above the limit", "below the limit"])
@pytest.mark.parametrize("stage", [0, 1])
def test_two_ranks_clip_as_pytorch_clips_the_whole(stage: int, factor: float) -> None:
    whole = parameters()
    before = flat(parameter.grad for parameter in whole)
    limit = factor * float(torch.linalg.vector_norm(before))
    clipping = Clipping((ZERO0, ZERO1)[stage], limit, world_size=2)
    ranks = held(clipping, stage)
    norm = math.sqrt(sum(float(clipping.squared_norm(gradients, CPU)) for gradients in ranks))
    for gradients in ranks:
        clipping.clip(gradients, norm)

    expected = torch.nn.utils.clip_grad_norm_(whole, limit or math.inf)
    assert norm == pytest.approx(float(expected), rel=1e-6)
    after = flat(parameter.grad for parameter in whole)
    assert torch.equal(after, before) == (factor != 0.5)
    copies = ranks if stage == 0 else [[flat(parts) for parts in zip(*ranks, strict=True)]]
    for gradients in copies:
        torch.testing.assert_close(flat(gradients), after)


def test_deepspeed_is_told_to_leave_what_is_ours() -> None:
    assert Clipping(ZERO0, 0.3, 2).settings(ZERO0) == {"gradient_clipping": 0.0}
    told = Clipping(ZERO1, 0.3, 2).settings(ZERO1)
    zero = {**ZERO1["zero_optimization"], "compute_grad_norm": False}
    assert told == {"gradient_clipping": 0.0, "zero_optimization": zero}


def test_a_deepspeed_that_cannot_leave_the_norm_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release from before `compute_grad_norm` clips by itself, and nothing is clipped twice."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    monkeypatch.delitem(DeepSpeedZeroConfig.model_fields, "compute_grad_norm", raising=False)
    clipping = Clipping(ZERO1, 0.3, 2)
    assert not clipping.is_ours
    assert clipping.settings(ZERO1) == {"gradient_clipping": 0.3}
    assert clipping.gradients(None, parameters()) == []
    assert float(clipping.squared_norm([], CPU)) == 0.0
    clipping.clip([], math.nan)
    assert Clipping(ZERO0, 0.3, 2).is_ours  # stage 0 has no such norm to leave
