"""What of a ds_config decides memory and communication, with DeepSpeed's defaults where it is silent (0.19)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llara_dist.ds_config import zero_stage

STAGE0_BUCKET = 500_000_000
"""gradients that stage 0 flattens and all-reduces at once, whatever the ds_config says"""


@dataclass(frozen=True)
class ZeroSettings:
    """ZeRO as a ds_config sets it; counts are elements, not bytes.

    Attributes:
        stage: 0 to 3.
        reduce_bucket: gradients that are reduced at once; under stages 1 to 3 a buffer of this size.
        overlap: whether reductions run beside the backward pass (a second buffer under stages 1 and 2).
        contiguous: whether gradients are copied into that buffer.
        offload_optimizer: whether masters, gradients and moments live on the host.
        offload_parameters: whether partitions of parameters live on the host.
        persistence: parameters up to this size stay whole on every rank (stage 3).
        model_persistence: most elements that stay whole for that reason.
        prefetch_bucket: elements that are gathered ahead at once (stage 3); 0 = none.
        max_live: gathered elements above which none is gathered ahead (stage 3).
        max_reuse_distance: gathered elements that are needed again sooner than this are kept (stage 3).
    """

    stage: int = 0
    reduce_bucket: int = 500_000_000
    overlap: bool = False
    contiguous: bool = True
    offload_optimizer: bool = False
    offload_parameters: bool = False
    persistence: int = 100_000
    model_persistence: int = 1 << 62
    prefetch_bucket: int = 50_000_000
    max_live: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000

    @classmethod
    def of(cls, ds_config: dict[str, Any]) -> ZeroSettings:
        """Read what `read_ds_config` returned."""
        zero = ds_config.get("zero_optimization", {})
        stage = zero_stage(ds_config)
        overlap = zero.get("overlap_comm")

        def offloads(section: str) -> bool:
            return (zero.get(section) or {}).get("device", "none") not in ("none", None)

        return cls(
            stage=stage,
            reduce_bucket=int(zero.get("reduce_bucket_size", cls.reduce_bucket)),
            overlap=stage == 3 if overlap is None else bool(overlap),
            contiguous=bool(zero.get("contiguous_gradients", True)),
            offload_optimizer=stage > 0 and offloads("offload_optimizer"),
            offload_parameters=stage == 3 and offloads("offload_param"),
            persistence=int(zero.get("stage3_param_persistence_threshold", cls.persistence)),
            model_persistence=int(zero.get("stage3_model_persistence_threshold", cls.model_persistence)),
            prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", cls.prefetch_bucket)),
            max_live=int(zero.get("stage3_max_live_parameters", cls.max_live)),
            max_reuse_distance=int(zero.get("stage3_max_reuse_distance", cls.max_reuse_distance)),
        )
