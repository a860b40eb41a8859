"""Doctor on two hosts: what only shows between nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, Hosts, missing
from tests.runs import ROOT

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]

COMMAND = (
    "from llara_dist.doctor import nodes; nodes.ARRIVING_S = {arriving_s}; from llara_dist.cli import main; main()"
)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path / "hosts", ["node-a", "node-b"]) as hosts:
        yield hosts


def start(host: Host, rank: int, out: Path, arriving_s: float = 180.0) -> subprocess.Popen[str]:
    numbers = {"RANK": rank, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "WORLD_SIZE": 2, "MASTER_PORT": 12345}
    variables = {name: str(number) for name, number in numbers.items()}
    variables |= {"MASTER_ADDR": "node-a", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMMAND.format(arriving_s=arriving_s)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return host.start([*command, "doctor", "--quick", "--json", "--out", out], env=variables, cwd=ROOT, **pipes)


def findings(text: str, severity: str) -> list[str]:
    found = json.loads(text.splitlines()[-1])["findings"]
    return [f"{each['check']}: {each['found']}" for each in found if each["severity"] == severity]


def doctor(hosts: Hosts, out: Path) -> tuple[list[int], str]:
    """Both hosts' exit codes, and what rank 0 said."""
    started = [start(host, rank, out) for rank, host in enumerate(hosts)]
    outputs = [process.communicate(timeout=280) for process in started]
    assert "[all 2 nodes]" in outputs[0][0], outputs
    assert outputs[1][0] == ""
    return [process.returncode for process in started], outputs[0][0]


def test_two_hosts_that_suit_each_other(hosts: Hosts, tmp_path: Path) -> None:
    codes, said = doctor(hosts, tmp_path / "runs")
    assert codes == [0, 0], said
    passed = findings(said, "passed")
    assert "ranks: 2 on 2 nodes" in passed
    assert any(line.startswith("host name: node-b is 10.77.0.12") for line in passed)
    assert any(line.startswith(f"shared folder: {tmp_path}: seen by 2 nodes") for line in passed)
    assert any(line.startswith("clocks: within") for line in passed)
    assert any(line.startswith("all-reduce: gloo, 2 ranks: right") for line in passed)
    assert [path.name for path in tmp_path.iterdir()] == ["hosts"]


def test_a_folder_that_is_not_shared_and_a_name_that_leads_nowhere(hosts: Hosts, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    for host in hosts:
        names = tmp_path / host.name
        other = next(other for other in hosts if other is not host)
        names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{other.address} {other.name}\n")
        host.check(f"mount --bind {names} /etc/hosts")
    hosts["node-b"].check(f"mount -t tmpfs own {runs}")
    codes, said = doctor(hosts, runs)
    assert codes == [2, 2]
    errors = findings(said, "error")
    assert f"shared folder: node-b: a file that rank 0 wrote to {runs} is not seen" in errors
    assert any(line.startswith("all-reduce: gloo over all nodes: rank ") for line in errors)
    assert any("node-b is 127.0.1.1, reached from here only" in line for line in findings(said, "warning"))
    assert list(runs.iterdir()) == []


def test_a_rank_that_does_not_come_is_named(hosts: Hosts, tmp_path: Path) -> None:
    process = start(hosts["node-a"], 0, tmp_path, arriving_s=20.0)
    said, complaint = process.communicate(timeout=280)
    assert process.returncode == 2
    assert "meeting: rank 1 of 2 did not come within 20 s" in findings(said, "error")
    assert "processor and memory" in said
    assert complaint.splitlines()[-1].startswith("error: doctor: 1 thing")
