"""A run's settings as a job keeps them, and what can be known to be wrong with them before the job is queued."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from llara_dist.cluster.batch_script import Resources
from llara_dist.config import RunConfig, to_dict
from llara_dist.distributed import World
from llara_dist.ds_config import load_ds_config
from llara_dist.errors import FindingsError
from llara_dist.integrity import json_text

OF_A_NODE = frozenset({"device", "compute dtype", "kernels here", "memory", "open files"})
"""Checks of `preflight` that concern the machine which computes, not the one that submits."""


def settings_files(config: RunConfig, folder: Path, suffix: str = "") -> dict[str, str]:
    """A run's settings and ds_config as files of a job's folder, texts by name; the run may be requeued."""
    ds_config = f"ds_config{suffix}.json"
    kept = dataclasses.replace(config, resume="auto", deepspeed=folder / ds_config)
    return {
        f"run{suffix}.yaml": yaml.safe_dump(to_dict(kept), sort_keys=False, allow_unicode=True),
        ds_config: json_text(load_ds_config(config.deepspeed)),
    }


def require_own_folder(config: RunConfig) -> None:
    """Refuse a folder that holds a run, unless the user said to go on from it: as a job it would.

    Raises:
        InputError: it does.
    """
    from llara_dist.training.preflight.examine import check_out

    check_out(config)


def check_run(config: RunConfig, resources: Resources) -> None:
    """What `preflight` can know on a machine that is not the one which computes.

    Raises:
        FindingsError: what was found wrong.
    """
    from llara_dist.training.preflight.examine import examine

    ranks = resources.most_nodes * resources.tasks_per_node
    checks, _ = examine(dataclasses.replace(config, device="cpu"), World(size=ranks), resources.tasks_per_node)
    errors = [finding for finding in checks.of("error") if finding.check not in OF_A_NODE]
    if errors:
        raise FindingsError(errors, str(config.out))
