"""Slurm's commands as small programs on PATH that answer what a test says and write down what they were asked."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, os, sys
from pathlib import Path

folder = Path(sys.argv[1])
name, arguments = Path(sys.argv[2]).name, sys.argv[3:]
script = sys.stdin.read() if name == "sbatch" and "--test-only" in arguments else ""
number = len((folder / "calls").read_text().splitlines()) if (folder / "calls").exists() else 0
call = {"name": name, "arguments": arguments, "environment": dict(os.environ), "script": script}
with open(folder / "calls", "a") as file:
    file.write(json.dumps(call) + "\\n")
kind = f"{name} --test-only" if "--test-only" in arguments else f"{name} {arguments[0]}" if name == "scontrol" else name
answers = json.loads((folder / "answers").read_text())
if name == "scontrol":
    kind = "scontrol config" if "config" in arguments else f"job {arguments[-1]}"
code, output, error = answers.get(kind, [0, "", ""])
if kind == "sbatch":
    submitted = sum(json.loads(line)["name"] == "sbatch" and "--test-only" not in json.loads(line)["arguments"]
                    for line in (folder / "calls").read_text().splitlines())
    output = output or f"{100 + submitted}\\n"
    if submitted >= answers["refuse_from"]:
        code, output, error = 1, "", "sbatch: error: too many jobs\\n"
if kind.startswith("job ") and kind not in answers:
    code, error = 1, "slurm_load_jobs error: Invalid job id specified\\n"
sys.stdout.write(output)
sys.stderr.write(error)
sys.exit(code)
"""


class FakeSlurm:
    """Slurm's commands on PATH.

    Args:
        folder: for the commands and what they write down.
        monkeypatch: sets PATH.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._answers: dict[str, tuple[int, str, str]] = {
            "scontrol config": (0, "ClusterName             = fake\n", "")
        }
        self._refuse_from = 1000
        (folder / "bin").mkdir(parents=True)
        (folder / "program.py").write_text(PROGRAM)
        words = [shlex.quote(word) for word in (sys.executable, str(folder / "program.py"), str(folder))]
        for name in ("sbatch", "scontrol", "scancel", "squeue", "sacct"):
            command = folder / "bin" / name
            command.write_text(f'#!/bin/sh\nexec {" ".join(words)} "$0" "$@"\n')
            command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        self.answer("sacct", 1, error="Slurm accounting storage is disabled\n")

    def answer(self, kind: str, code: int = 0, output: str = "", error: str = "") -> None:
        """What "sbatch", "sbatch --test-only", "squeue", "scancel", … or scontrol of "job 101" answer from now on."""
        self._answers[kind] = (code, output, error)
        (self.folder / "answers").write_text(json.dumps({**self._answers, "refuse_from": self._refuse_from}))

    def refuse_from(self, number: int) -> None:
        """Let sbatch take fewer than so many jobs."""
        self._refuse_from = number
        self.answer("sbatch")

    def job(self, job_id: str, state: str, folder: Path, **fields: str) -> None:
        """Let the controller know a job."""
        parts = {"JobId": job_id, "JobName": "x", "JobState": state, "Reason": "None", "NodeList": "(null)", **fields}
        line = " ".join(f"{name}={value}" for name, value in parts.items())
        self.answer(f"job {job_id}", output=f"{line} Command=x WorkDir={folder} StdErr=y \n")

    def calls(self, name: str) -> list[dict[str, Any]]:
        """What a command was asked, in order."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if call["name"] == name]
