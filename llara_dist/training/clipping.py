"""The norm of a step's gradients, and clipping by it, without a host synchronisation of their own.

DeepSpeed reads its norms on the host several times a step (once a parameter group and more, 0.19.8). Here the squares
of what a rank holds ride in the one tensor that the ranks sum and read anyway. Where gradients lie on the host
(offload) or in stage 3's partitions, DeepSpeed's own norm and clipping are kept: it offers no way around them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llara_dist.cost.zero import ZeroSettings

EPSILON = 1e-6
"""added to the norm, as torch and DeepSpeed do"""


class Clipping:
    """Clips by the global norm, itself or through DeepSpeed.

    Args:
        ds_config: as `read_ds_config` returns it.
        max_norm: norm to which gradients are clipped; 0 = off.
        world_size: ranks.
    """

    def __init__(self, ds_config: dict[str, Any], max_norm: float, world_size: int) -> None:
        zero = ZeroSettings.of(ds_config)
        self._stage = zero.stage
        self._max_norm = max_norm
        self._copies = world_size if zero.stage == 0 else 1
        self.is_ours = zero.stage == 0 or (zero.stage < 3 and not zero.offload_optimizer and _norm_can_be_left())

    def settings(self, ds_config: dict[str, Any]) -> dict[str, Any]:
        """What DeepSpeed is to be told: to clip, or to leave norm and clipping alone."""
        if not self.is_ours:
            return {"gradient_clipping": self._max_norm}
        if self._stage == 0:
            return {"gradient_clipping": 0.0}
        zero = {**ds_config["zero_optimization"], "compute_grad_norm": False}
        return {"gradient_clipping": 0.0, "zero_optimization": zero}

    def gradients(self, optimizer: Any, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """What this rank holds of the reduced gradients after the last backward pass: all of them, or its partition.

        Args:
            optimizer: DeepSpeed's.
            parameters: that train.

        Returns:
            The tensors that the update will read; none where DeepSpeed clips.
        """
        if not self.is_ours:
            return []
        if self._stage == 0:
            return [parameter.grad for parameter in parameters if parameter.grad is not None]
        return [part for group in optimizer.averaged_gradients.values() for part in group]

    def squared_norm(self, gradients: list[Tensor], device: torch.device) -> Tensor:
        """This rank's share of the squared global norm, float64 scalar; the ranks' shares sum to it.

        Args:
            gradients: what `gradients` returned.
            device: of this rank.
        """
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=device)
        return torch.nn.utils.get_total_norm(gradients).double().square() / self._copies

    def clip(self, gradients: list[Tensor], norm: float) -> None:
        """Scale the gradients down, in place, where the norm is above the limit.

        Args:
            gradients: what `gradients` returned.
            norm: over all ranks; not a number = the step is skipped.
        """
        if gradients and 0 < self._max_norm < norm + EPSILON:
            torch._foreach_mul_(gradients, self._max_norm / (norm + EPSILON))


def _norm_can_be_left() -> bool:
    """Whether this DeepSpeed can leave a norm uncomputed; releases before `compute_grad_norm` cannot."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return "compute_grad_norm" in DeepSpeedZeroConfig.model_fields
