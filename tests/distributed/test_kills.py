"""A run that is killed at random moments, saves included, and resumed each time, ends as one left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT

KILLS = 50


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_killed_50_times_and_resumed_is_bit_for_bit(inputs: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.kills", str(inputs), str(tmp_path), str(KILLS), "0"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    print(seen)
    assert seen["kills"] == KILLS
    assert seen["completed"] >= 1
    assert seen["in_save"] >= 1, "no kill fell into a save"
