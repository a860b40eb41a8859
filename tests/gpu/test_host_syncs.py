"""On a GPU a micro-batch waits for nothing, and an optimizer step once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2"])
def test_a_step_synchronises_once_and_a_microbatch_never(inputs: Path, tmp_path: Path, stage: str) -> None:
    command = [sys.executable, "-m", "tests.gpu.host_syncs", str(inputs), str(tmp_path / "run"), stage]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "DS_ACCELERATOR": "cuda", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["synchronisations"]) == 1, found["synchronisations"]
    assert "engine.py" in found["synchronisations"][0]
    assert found["norm"] > 0
