"""Clusters that tests run on: skipped with a reason where there can be none, an error where CI promises one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster import slurm as slurm_cluster
from tests.cluster.slurm import Slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm cluster with a controller and three nodes."""
    missing = slurm_cluster.missing()
    if missing and os.environ.get("CI"):
        pytest.fail(f"no Slurm: {missing}")
    if missing:
        pytest.skip(f"no Slurm: {missing}")
    with Slurm(tmp_path_factory.mktemp("cluster") / "slurm") as cluster:
        yield cluster
