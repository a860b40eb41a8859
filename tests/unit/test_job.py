"""Which start of which job this is, as the scheduler's variables say."""

from __future__ import annotations

import pytest

from llara_dist.distributed import Job, first_host, read_job, slurm_master
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


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("gpu-[003-007,9],x1", "gpu-003"),
        ("r[2,4]n[07-09]-ib,other", "r2n07-ib"),
        ("n[12]", "n12"),
    ],
)
def test_the_first_host_of_a_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def master(job: int, restart: int = 0, step: int = 0) -> tuple[str, int] | None:
    numbers = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restart, "SLURM_STEP_ID": step}
    return slurm_master({"SLURM_STEP_NODELIST": "n[3,5]", **{name: str(value) for name, value in numbers.items()}})


def test_jobs_steps_and_restarts_meet_at_ports_of_their_own() -> None:
    starts = [(job, restart, step) for job in range(7000, 8024) for restart in range(8) for step in range(2)]
    masters = [master(*start) for start in starts]
    assert len(set(masters)) == len(starts)
    assert all(where is not None and where[0] == "n3" and 1024 < where[1] < 29500 for where in masters)
    assert master(4_000_000_000, 123, 45) is not None


def test_outside_of_a_step_nobody_is_met() -> None:
    assert slurm_master({}) is None
    assert slurm_master({"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1"}) is None
