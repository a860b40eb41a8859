"""Which start of which job this is, as the scheduler's variables say."""

from __future__ import annotations

import pytest

from llara_dist.distributed import Job, read_job
from llara_dist.errors import InputError


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, Job()),
        ({"SLURM_RESTART_COUNT": "3"}, Job()),
        ({"SLURM_JOB_ID": "12"}, Job("12", 0, "")),
        ({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2", "SLURM_STEP_ID": "1"}, Job("12", 2, "1")),
        ({"SLURM_JOB_ID": "12", "SLURM_CLUSTER_NAME": "alps"}, Job("12@alps", 0, "")),
    ],
)
def test_the_job_of_an_environment(environment: dict[str, str], job: Job) -> None:
    assert read_job(environment) == job


def test_a_restart_count_that_is_no_number() -> None:
    with pytest.raises(InputError, match="SLURM_RESTART_COUNT=x"):
        read_job({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "x"})
