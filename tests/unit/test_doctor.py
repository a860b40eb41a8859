"""`llara-dist doctor` as a person starts it: exit codes, --json, nothing that hangs and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llara_dist.cli import normalise, switches_of
from llara_dist.doctor import base_model, command, shards
from tests.runs import ROOT
from tests.servers import FaultyServer

TOPICS = [
    "processor and memory",
    "GPUs",
    "libraries",
    "links and limits",
    "network",
    "folders",
    "shards",
    "model",
    "starting on several nodes",
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]


def doctor(
    *options: str | Path, starter: list[str] | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    words = [*(starter or [sys.executable]), "-m", "llara_dist.cli", "doctor", *map(str, options)]
    environment = {**os.environ, "COLUMNS": "100", **variables}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)


# Shards and model


def test_shards_that_are_sound(inputs: Path) -> None:
    findings, tokenizer = shards.examine(str(inputs / "shards"), 8, quick=False)
    assert [finding.severity for finding in findings] == ["passed", "passed"]
    assert "326 samples in 1 shard," in findings[0].found
    assert tokenizer == json.loads((inputs / "shards" / "shards.json").read_text())["tokenizer_hash"]


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    (finding,), tokenizer = shards.examine(str(tmp_path), 8, quick=False)
    assert finding.severity == "error"
    assert "shards.json: not found" in finding.found
    assert tokenizer is None


def test_shards_that_are_damaged(inputs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(inputs / "shards", tmp_path / "shards"))
    tar = next((copy / "train").glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 0xFF
    tar.write_bytes(data)
    findings, _ = shards.examine(str(copy), 8, quick=False)
    assert [finding.severity for finding in findings] == ["passed", "error"]
    assert "sample at offset" in findings[1].found
    tar.write_bytes(data[: len(data) // 2])
    (finding,), _ = shards.examine(str(copy), 8, quick=False)
    assert f"{tar}: {len(data) // 2} bytes, the manifest names {len(data)}" in finding.found


def test_shards_at_a_url_are_fetched_and_thrown_away(
    inputs: Path, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    server.files = {
        f"s/{path.relative_to(inputs / 'shards')}": path.read_bytes()
        for path in (inputs / "shards").rglob("*")
        if path.is_file()
    }
    findings, _ = shards.examine(f"{server.url}/s", 8, quick=False)
    assert [finding.check for finding in findings] == ["shards", "reading", "fetching"]
    assert {finding.severity for finding in findings} == {"passed"}
    assert list(tmp_path.iterdir()) == []
    server.files = {}
    (finding,), _ = shards.examine(f"{server.url}/s", 8, quick=False)
    assert finding.severity == "error"


@pytest.mark.parametrize(("rate", "severity"), [(10_000.0, "passed"), (100.0, "warning")])
def test_reading_must_keep_up_with_a_gpu(rate: float, severity: str) -> None:
    (finding,) = shards.check_reading(2 * rate, rate, tokens=200.0)
    assert finding.severity == severity
    assert "takes about 50" in finding.found


@pytest.mark.parametrize(("fetched", "severity"), [(50e6, "passed"), (1e5, "warning")])
def test_fetching_must_keep_up_with_a_node(fetched: float, severity: str) -> None:
    (finding,) = shards.check_fetching(fetched, tokens=200.0, sample_bytes=1500.0, ranks=8)
    assert finding.severity == severity
    assert "take about 0.6 MB/s" in finding.found


def test_the_model_folder(inputs: Path, tmp_path: Path) -> None:
    built_with = json.loads((inputs / "shards" / "shards.json").read_text())["tokenizer_hash"]
    findings = base_model.examine(str(inputs / "llm"), built_with)
    assert [finding.check for finding in findings] == ["configuration", "weight files", "tokenizer"]
    assert {finding.severity for finding in findings} == {"passed"}
    other = base_model.examine(str(inputs / "llm"), "0" * 64)[-1]
    assert (other.severity, "000000000000" in other.found) == ("error", True)
    copy = Path(shutil.copytree(inputs / "llm", tmp_path / "llm"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert [finding.check for finding in base_model.examine(str(copy), None) if finding.severity == "error"] == [
        "weight files"
    ]


# The command


def test_a_switch_needs_no_value() -> None:
    switches = switches_of(command.doctor)
    assert switches == {"--quick"}
    given = ["--quick", "--out", "runs", "--json", "--quick", "false"]
    assert normalise("doctor", given, switches) == ["--quick=true", *given[1:-2], "--quick=false"]
    assert normalise("doctor", ["--out", "runs", "--quick"], switches)[-1] == "--quick=true"
    assert normalise("doctor", [], switches) == []


@pytest.mark.long
def test_the_command_on_this_machine(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a b'$(touch x)%j"
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = doctor(
        "--out", out, "--model", inputs / "llm", "--shards", inputs / "shards", "--json", TMPDIR=str(temporary)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    findings = json.loads(last)["findings"]
    assert list(dict.fromkeys(finding["topic"] for finding in findings)) == TOPICS
    assert [line.rstrip() for line in lines if line.rstrip() in TOPICS] == TOPICS
    by_check = {finding["check"]: finding for finding in findings}
    for check in ("bitsandbytes", "deepspeed", "imports", "all-reduce", "writing", "reading", "configuration"):
        assert by_check[check]["severity"] == "passed", by_check[check]
    assert all(finding["remedy"] for finding in findings if finding["severity"] in ("warning", "error"))
    warnings = sum(finding["severity"] == "warning" for finding in findings)
    assert lines[-1] == f"0 errors, {warnings} warning{'s' * (warnings != 1)}"
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]
    assert list(temporary.iterdir()) == []
    assert not (ROOT / "x").exists()


def test_an_error_ends_with_exit_code_2(tmp_path: Path) -> None:
    done = doctor("--quick", "--out", tmp_path, "--shards", tmp_path / "none", "--json")
    assert done.returncode == 2
    *_, line, last = done.stdout.splitlines()
    assert line.startswith("1 error, ")
    assert done.stderr.splitlines()[-1] == "error: doctor: 1 thing would stop a run; see the table"
    (found,) = [finding for finding in json.loads(last)["findings"] if finding["severity"] == "error"]
    assert (found["topic"], found["check"]) == ("shards", "shards")


def test_an_nvidia_smi_that_fails_is_an_error(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18\n")
    smi.chmod(0o755)
    done = doctor("--quick", "--out", tmp_path, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 2
    assert "Driver/library version mismatch" in " ".join(done.stdout.split())


@pytest.mark.long
def test_two_ranks_of_torchrun(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = doctor("--quick", "--out", out, "--json", starter=[*TORCHRUN, "--standalone"], GLOO_SOCKET_IFNAME="lo")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    together = [finding for finding in json.loads(lines[-1])["findings"] if finding["topic"] == "all nodes together"]
    assert {finding["severity"] for finding in together} == {"passed"}
    assert [finding["check"] for finding in together] == ["ranks", "places", "code", "versions", "all-reduce"]
    assert together[0]["found"] == "2 on 1 node"
    assert sum("processor and memory" in line for line in lines[:-1]) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_error_on_one_rank_ends_all(tmp_path: Path) -> None:
    rendezvous = tmp_path / "rendezvous"
    variables = {"WORLD_SIZE": "2", "LLARA_DIST_INIT_METHOD": f"file://{rendezvous}", "GLOO_SOCKET_IFNAME": "lo"}
    words = [sys.executable, "-m", "llara_dist.cli", "doctor", "--quick", "--shards", str(tmp_path / "none")]
    started = [
        subprocess.Popen(
            [*words, "--out", str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=250) for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert "1 error, " in outputs[0][0]
    assert outputs[1] == ("", "")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="a host name of one's own needs root")
def test_a_host_name_that_does_not_resolve(tmp_path: Path) -> None:
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname nowhere.invalid && exec "$@"', "sh", sys.executable]
    done = doctor("--quick", "--out", tmp_path, starter=renamed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nowhere.invalid does not resolve" in " ".join(done.stdout.split())


def test_a_bare_argument_may_follow_switches() -> None:
    found = normalise("top", ["--once", "--all", "false", "runs/a", "--every", "3"], {"--once", "--all"})
    assert found == ["--once=true", "--all=false", "--run", "runs/a", "--every", "3"]
