"""The quickstart, shortened: every stage, two ranks, the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_the_whole_way_from_another_folder(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "llara-dist"), "quickstart", "--out", "q", "--steps", "4", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["arms"]) == {"random", "SASRec", "text-only", "hybrid"}
    assert result["arms"]["text-only"]["rows"] == 1200
    assert result["arms"]["text-only"]["generated"]["hr@1"] > 0.15  # the base reads and copies; random is .10
    page = (tmp_path / "q" / "report.html").read_text()
    assert all(sentence.split(",")[0] in page for sentence in result["findings"][:1])
    assert "<svg" in page
