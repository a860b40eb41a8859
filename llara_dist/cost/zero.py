"""What of a ds_config decides memory and communication, with DeepSpeed's defaults where it is silent (0.19)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llara_dist.ds_config import zero_stage
from llara_dist.errors import InputError

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
    def of(cls, ds_config: dict[str, Any], shown: str = "ds_config") -> ZeroSettings:
        """Read what `read_ds_config` returned; stage 3's keys by their names with and without `stage3_`.

        Args:
            ds_config: as loaded.
            shown: its path, for messages.

        Raises:
            InputError: a value is of a type that DeepSpeed does not take; names the key.
        """
        zero = _Section(ds_config.get("zero_optimization", {}), f"{shown}: zero_optimization")
        stage = zero_stage(ds_config)
        unsaid = zero.values.get("overlap_comm") is None
        return cls(
            stage=stage,
            reduce_bucket=zero.count("reduce_bucket_size", cls.reduce_bucket),
            overlap=stage == 3 if unsaid else zero.flag("overlap_comm", False),
            contiguous=zero.flag("contiguous_gradients", True),
            offload_optimizer=zero.offloads("offload_optimizer") and stage > 0,
            offload_parameters=zero.offloads("offload_param") and stage == 3,
            persistence=zero.count("stage3_param_persistence_threshold", cls.persistence),
            model_persistence=zero.count("stage3_model_persistence_threshold", cls.model_persistence),
            prefetch_bucket=zero.count("stage3_prefetch_bucket_size", cls.prefetch_bucket),
            max_live=zero.count("stage3_max_live_parameters", cls.max_live),
            max_reuse_distance=zero.count("stage3_max_reuse_distance", cls.max_reuse_distance),
        )


class _Section:
    """Typed reading of one JSON object, by pydantic's rules as DeepSpeed reads it (5e7 and "50000000" are counts)."""

    def __init__(self, values: Any, name: str) -> None:
        if not isinstance(values, dict):
            raise InputError(f"{name} must be an object, found {values!r}; see ds_configs/")
        self.values, self.name = values, name

    def count(self, key: str, default: int) -> int:
        """A number of elements; the name with `stage3_` goes first where both are given."""
        key = key if key in self.values else key.removeprefix("stage3_")
        return self._read(key, default, int, "a whole number, 0 or more")

    def flag(self, key: str, default: bool) -> bool:
        return self._read(key, default, bool, "true or false")

    def offloads(self, key: str) -> bool:
        inner = self.values.get(key)
        return inner is not None and _Section(inner, f"{self.name}.{key}").values.get("device") not in ("none", None)

    def _read(self, key: str, default: Any, kind: Any, must: str) -> Any:
        from pydantic import TypeAdapter, ValidationError

        try:
            value = TypeAdapter(kind).validate_python(self.values.get(key, default))
        except ValidationError:
            value = None
        if value is None or value < 0:
            raise InputError(f"{self.name}.{key}={self.values[key]!r} must be {must}; see ds_configs/")
        return value
