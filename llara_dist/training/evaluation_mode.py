"""A model under training lent out for evaluation, and taken back as if nothing had been.

What an evaluation between two optimizer steps could change, and what is done about it:

- training mode of modules: each module gets back its own, also after an exception;
- torch's generators: forked. Nothing here draws from Python's or NumPy's;
- gradients and optimizer state: no graph is built, so that no gradient hook of DeepSpeed runs;
- 4-bit weights on a CPU with AVX512-BF16: bitsandbytes repacks them in place in evaluation mode and never undoes it;
  it is told that there is no such CPU;
- ZeRO-3's coordinator: it gathers each submodule's parameters when the submodule is called, checks the calls against
  the order that it recorded in training, and prefetches by that order. An evaluation calls other submodules in another
  order, and called while an order is being recorded it would become part of it. So the recorded order is dropped first:
  without one every submodule is gathered when it is called and freed after it, but for the small parameters that
  training never frees, which are held here too. Two training micro-batches later the order is recorded again;
- ZeRO-3's count of forward calls whose backward is to come: it counts without a graph too, and is put back.

Under ZeRO-3 every submodule call is a collective: the ranks must make the same calls (`evaluation/lockstep.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llara_dist.training.engine import Engine

_PENDING = "applied_pre_backward_ref_cnt"
"""DeepSpeed's count on a module of forward calls whose backward is to come"""
_HELD = -1
"""stands among the submodules that are using a parameter, whose ids count from 0; DeepSpeed frees what nothing uses"""
_REPACKS = "support_avx512bf16_for_cpu"
"""bitsandbytes' flag on a 4-bit layer"""


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds the parameters in parts, so that a submodule's call is a collective of all ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def evaluation_mode(engine: Engine) -> Iterator[None]:
    """The engine's model in evaluation mode, its submodules callable one by one; every rank enters and leaves.

    Not between a micro-batch's backward pass and the update that it belongs to.
    """
    modules = list(engine.model.modules())
    training = [module.training for module in modules]
    repacks = [module for module in modules if getattr(module, _REPACKS, False)]
    devices = [engine.device] if engine.device.type == "cuda" else []
    partitioned = is_partitioned(engine.model)
    pending = [module.__dict__.get(_PENDING) for module in modules]
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            engine.model.eval()
            for module in repacks:
                setattr(module, _REPACKS, False)
            if partitioned:
                _forget_order(engine.optimizer)
                _gather_on_access(modules, True)
                _hold_small(engine.model)
            yield
        finally:
            for module, mode in zip(modules, training, strict=True):
                module.training = mode
            for module in repacks:
                setattr(module, _REPACKS, True)
            if partitioned:
                _gather_on_access(modules, False)
                for module, count in zip(modules, pending, strict=True):
                    if count is not None:
                        setattr(module, _PENDING, count)
                    else:
                        module.__dict__.pop(_PENDING, None)
    if partitioned:
        engine.optimizer.empty_partition_cache()  # what is held, and what an access gathered


def _forget_order(optimizer: Any) -> None:
    coordinator = optimizer.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def _hold_small(model: nn.Module) -> None:
    """Keep parameters below `stage3_param_persistence_threshold` whole, as training does once an order is recorded."""
    for parameter in model.parameters():
        held: Any = parameter
        if held.ds_persist:
            held.ds_active_sub_modules.add(_HELD)


def _gather_on_access(modules: list[nn.Module], on: bool) -> None:
    """A parameter read outside its module's own call is gathered on reading, as inside DeepSpeedEngine.forward.

    The projector's op reads its layers' weights; until its first call nobody else knows.
    """
    for module in modules:
        parameters: Any = module._parameters
        parameters._in_forward = on
