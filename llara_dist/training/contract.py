"""What a run and its resumption must have in common."""

from __future__ import annotations

from typing import Any

from llara_dist.config import RunConfig, to_dict
from llara_dist.errors import InputError
from llara_dist.integrity import sha256_json
from llara_dist.model.llama import base_fingerprint
from llara_dist.recommenders.item_table import ItemTable
from llara_dist.stream.plan import Plan
from llara_dist.training.checkpoints.checkpoint import Checkpoint


def contract_of(config: RunConfig, plan: Plan, item_table: ItemTable, total_steps: int) -> dict[str, Any]:
    """What the course of a run depends on beside the state that a checkpoint carries; reads no weight whole."""
    sections = to_dict(config)
    return {
        "plan": plan.hash,
        "total_steps": total_steps,
        "seed": config.seed,
        "base_model": base_fingerprint(config.model),
        "item_table": sha256_json(item_table.info["files"]),
        "bits": config.model.bits,
        "lora": sections["lora"],
        "projector": sections["projector"],
        "curriculum": sections["curriculum"],
        "optimizer": sections["optimizer"],
    }


def check_contract(checkpoint: Checkpoint, contract: dict[str, Any]) -> None:
    """A resumed run must be the one that was stopped.

    Raises:
        InputError: names every part that differs.
    """
    parts = differences(checkpoint.state["contract"], contract)
    if parts:
        raise InputError(
            f"{checkpoint.path}: cannot go on from it: {', '.join(parts)}; "
            "give the settings of the first start, or another --out"
        )


def differences(saved: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """Each setting that is not as it was, by its dotted name: "lora.rank was 8, now 4"."""
    found = []
    for name in now | saved:
        old, new = saved.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{where}{name}.")
        elif old != new:
            found.append(f"{where}{name} was {_short(old)}, now {_short(new)}")
    return found


def _short(value: Any) -> str:
    """A value for a person; of a hash, what is enough to tell it from another."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)
