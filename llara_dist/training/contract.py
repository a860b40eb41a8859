"""What a run and its resumption must have in common, and the versions that a result depends on."""

from __future__ import annotations

import platform
from typing import Any

from llara_dist import __version__
from llara_dist.config import RunConfig, to_dict
from llara_dist.errors import InputError
from llara_dist.integrity import sha256_json
from llara_dist.model.llama import base_fingerprint
from llara_dist.recommenders.item_table import ItemTable
from llara_dist.stream.plan import Plan
from llara_dist.training.checkpoint import Checkpoint


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that a result depends on."""
    from importlib.metadata import version

    names = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")
    return {"llara_dist": __version__, "python": platform.python_version()} | {name: version(name) for name in names}


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
        InputError: names the first part that differs.
    """
    saved = checkpoint.state["contract"]
    for name, value in contract.items():
        if saved.get(name) != value:
            raise InputError(
                f"{checkpoint.path}: cannot go on from it: {name} was {saved.get(name)!r}, now {value!r}; "
                "give the settings of the first start, or another --out"
            )
