"""Doctor under srun on a real Slurm."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm
from tests.runs import ROOT

pytestmark = pytest.mark.long


def test_every_node_of_a_job_is_examined(slurm: Slurm, tmp_path: Path) -> None:
    tasks = ["srun", "--nodes=2", "--ntasks-per-node=1", "--time=5", f"--chdir={ROOT}"]
    command = [sys.executable, "-m", "llara_dist.cli", "doctor", "--quick", "--json", "--out"]
    environment = {"PYTHONPATH": str(ROOT)}
    done = slurm.command(*tasks, *command, tmp_path / "runs", env=environment, timeout_s=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {each["check"]: each["found"] for each in json.loads(done.stdout.splitlines()[-1])["findings"]}
    assert found["ranks"] == "2 on 2 nodes"
    assert ", in job " in found["Slurm"]
    assert "seen by 2 nodes" in found["shared folder"]
    assert found["all-reduce"].startswith("gloo, 2 ranks: right")
    missing = slurm.command(*tasks, *command, tmp_path, "--shards", tmp_path, env=environment, timeout_s=280)
    assert missing.returncode == 2, missing.stdout + missing.stderr
    assert "error: doctor: 2 things would stop a run" in missing.stderr
