"""Where a checkpoint comes from: a run can be told from its checkpoint alone.

`state.json` holds, beside `format_version`:

- `step`, `total_steps`: optimizer steps done, and T.
- `created`: when the state was taken, UTC, ISO 8601.
- `progress`: what the loop counted beside steps, as it gave it; a resumed run goes on from it.
- `contract`: what the course of the run depends on; a resumption with another one is refused.
- `config`: every setting of the run, inputs named from the root.
- `ds_config`: what DeepSpeed was told of ZeRO, communication and precision.
- `data`: hashes of what the run stands on: `shards` (manifests of all splits), `plan` (which samples make which step),
  `dataset` (its name and hash), `sources` (of a mixture: name, shards and data set of each), `tokenizer`,
  `item_table`, `recommender` (which model), `base_model` (fingerprint of the frozen weights).
- `code`: `version` of this package; of a git checkout also `commit`, and `dirty`: whether its code differs from it.
- `versions`: of this package, Python and the libraries that a result depends on.
- `world_size`, `hosts`: how many ranks there were; of each host how many and on which devices.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llara_dist import __version__, distributed
from llara_dist.ds_config import CHECKOUT
from llara_dist.training.preflight.examine import Inputs
from llara_dist.training.preflight.versions import versions


def provenance(
    config: dict[str, Any],
    inputs: Inputs,
    contract: dict[str, Any],
    world: distributed.World,
    device: torch.device,
) -> dict[str, Any]:
    """The part of state.json that stays the same all through a run; every rank calls it once (a collective).

    Args:
        config: the run's, as plain values.
        inputs: what the run stands on.
        contract: as the run compares it on resumption.
        world: where this process stands.
        device: of this rank.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    places = distributed.gather_objects((socket.gethostname(), name))
    return {
        "contract": contract,
        "config": config,
        "ds_config": inputs.ds_config,
        "data": data_hashes(inputs) | {name: contract[name] for name in ("item_table", "base_model")},
        "code": code_version(CHECKOUT) if world.is_main else {},
        "versions": versions(),
        "world_size": world.size,
        "hosts": hosts(places),
    }


def data_hashes(inputs: Inputs) -> dict[str, Any]:
    """What the samples are made of, by hash."""
    info = inputs.shards.info
    hashes = {
        "shards": info["hash"],
        "plan": inputs.plan.hash,
        "dataset": {name: info["dataset"][name] for name in ("name", "hash")},
        "tokenizer": info["tokenizer_hash"],
        "recommender": inputs.item_table.info.get("model"),
    }
    if "sources" in info:
        hashes["sources"] = [
            {name: source[name] for name in ("name", "hash", "dataset_hash", "weight")} for source in info["sources"]
        ]
    return hashes


def code_version(checkout: Path) -> dict[str, Any]:
    """This package's version; where it runs from a git checkout also `commit` and `dirty`.

    Args:
        checkout: the folder that holds the package.
    """
    code: dict[str, Any] = {"version": __version__}
    top = _git(checkout, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != checkout.resolve():
        return code  # no git, or the package lies in a folder of somebody else's checkout
    commit = _git(checkout, "rev-parse", "HEAD")
    # Only where code lies: a run's own outputs in the checkout change nothing.
    changes = _git(checkout, "status", "--porcelain", "--", "llara_dist", "launch", "pyproject.toml")
    if commit is not None and changes is not None:
        code |= {"commit": commit, "dirty": bool(changes)}
    return code


def hosts(places: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """By host name, how many ranks it has and on which kinds of device.

    Args:
        places: of each rank its host and its device's name.
    """
    found: dict[str, dict[str, Any]] = {}
    for host, device in places:
        entry = found.setdefault(host, {"ranks": 0, "devices": []})
        entry["ranks"] += 1
        if device not in entry["devices"]:
            entry["devices"].append(device)
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, None where there is no git, no checkout, or no answer."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
