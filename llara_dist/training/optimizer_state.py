"""AdamW's moments by parameter name, whole on every rank, whatever the ZeRO stage that partitions them.

Stage 0 keeps torch's own state per parameter. Stages 1 and 2 hold flat fp32 partitions, each parameter mapped to its
fragment (`param._hp_mapping`). Stage 3 holds flat sub-groups of each parameter's local partition
(`optimizer.grad_position`). DeepSpeed's `safe_get_full_optimizer_state` and `safe_set_full_*` are not used where they
fail: under stages 1 and 2 they see only the first parameter group's moments (they are linked after the first group's
step, before the second group has any), and under stage 3 they cannot set a tensor whose size is not divisible by the
world size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _stage(parameter: nn.Parameter) -> int:
    if hasattr(parameter, "ds_id"):
        return 3
    return 2 if hasattr(parameter, "_hp_mapping") else 0


def read_masters(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Whole float32 masters by name, on the CPU; a collective under ZeRO: every rank calls it."""
    from deepspeed.utils import safe_get_full_fp32_param

    masters = {}
    for name, parameter in parameters.items():
        whole = parameter.detach() if _stage(parameter) == 0 else safe_get_full_fp32_param(parameter)
        assert whole is not None
        masters[name] = whole.to("cpu", torch.float32, copy=True).contiguous()
    return masters


def read_moments(optimizer: Any, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Whole moments as `exp_avg/NAME`, `exp_avg_sq/NAME` (float32) and `step/NAME` (float32 scalar), on the CPU.

    A collective under ZeRO: every rank calls it. Empty before the first step.
    """
    inner = _inner(optimizer)
    if not inner.state:
        return {}
    moments = {}
    for name, parameter in parameters.items():
        stage = _stage(parameter)
        state = inner.state[_flat(optimizer, parameter, stage)]
        for key in MOMENTS:
            whole = _read_whole(parameter, stage, state[key], key)
            moments[f"{key}/{name}"] = whole.detach().to("cpu", torch.float32, copy=True).contiguous()
        moments[f"step/{name}"] = torch.tensor(float(state["step"]))
    return moments


def _flat(optimizer: Any, parameter: nn.Parameter, stage: int) -> Tensor:
    """The tensor of the inner optimizer that holds (this rank's part of) the parameter."""
    if stage == 0:
        return parameter
    if stage == 3:
        return optimizer.fp32_partitioned_groups_flat[optimizer.grad_position[optimizer.get_param_id(parameter)][0]]
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        if any(member is parameter for member in group):
            return flat
    raise KeyError("parameter is in no group of the optimizer")


def _read_whole(parameter: nn.Parameter, stage: int, local: Tensor, key: str) -> Tensor:
    """One moment in the parameter's shape, from every rank's part of it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if stage == 0:
        return local
    if stage == 3:
        whole = safe_get_full_optimizer_state(parameter, key)
        assert whole is not None
        return whole
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    mapping: Any = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
    if mapping is not None:
        target, source = mapping.lp_fragment_address, mapping.hp_fragment_address
        whole.narrow(0, target.start, target.numel).copy_(local.narrow(0, source.start, source.numel))
    torch.distributed.all_reduce(whole)
    return whole.view_as(parameter)


def write_moments(optimizer: Any, parameters: dict[str, nn.Parameter], moments: dict[str, Tensor]) -> None:
    """Fill the optimizer's state, made before its first step, from what `read_moments` gave on any world size.

    Raises:
        KeyError: a parameter has no moments.
    """
    if not moments:
        return
    inner = _inner(optimizer)
    for name, parameter in parameters.items():
        stage = _stage(parameter)
        flat = _flat(optimizer, parameter, stage)
        state = inner.state[flat]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            for key in MOMENTS:
                state[key] = torch.zeros_like(flat)
        state["step"].fill_(float(moments[f"step/{name}"]))
        for key in MOMENTS:
            _write_fragment(optimizer, parameter, stage, state[key], moments[f"{key}/{name}"])


def _write_fragment(optimizer: Any, parameter: nn.Parameter, stage: int, local: Tensor, whole: Tensor) -> None:
    values = whole.flatten().to(local.device, local.dtype)
    if stage == 0:
        local.view(-1).copy_(values)
    elif stage == 2:
        mapping: Any = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
        if mapping is not None:  # else no element of this parameter is in this rank's partition
            source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
            local.narrow(0, target.start, target.numel).copy_(values.narrow(0, source.start, source.numel))
    else:
        _, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        rank = torch.distributed.get_rank()
        mine = values[rank * length : (rank + 1) * length]  # the last partition may be padded
        local.narrow(0, offset, mine.numel()).copy_(mine)


def forget_moments(optimizer: Any, parameters: dict[str, nn.Parameter]) -> None:
    """Set the parameters' moments and step count back to where AdamW begins; no collective.

    Under stages 1 to 3 the flat tensors that hold the parameters must hold no others: call it for a whole parameter
    group.
    """
    inner = _inner(optimizer)
    flats = {id(flat): flat for flat in (_flat(optimizer, p, _stage(p)) for p in parameters.values())}
    for flat in flats.values():
        for value in inner.state.get(flat, {}).values():
            if isinstance(value, Tensor):
                value.zero_()
