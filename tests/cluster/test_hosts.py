"""The hosts themselves: what tests of launchers and schedulers stand on."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, missing

pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing() or "-")]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path / "hosts", ["one", "two"]) as hosts:
        yield hosts


def test_hosts_know_each_other_and_have_their_own_processes(hosts: Hosts) -> None:
    assert hosts["one"].check("hostname; getent hosts two").split() == ["one", hosts["two"].address, "two"]
    sleeper = hosts["two"].start(["sleep", "1000"])
    deadline = time.monotonic() + 30
    while not hosts["two"].processes("sleep 1000"):
        assert sleeper.poll() is None
        assert time.monotonic() < deadline
    assert hosts["one"].processes("sleep 1000") == []


def test_a_host_that_is_killed_takes_processes_and_network_with_it_and_boots_again(
    hosts: Hosts, tmp_path: Path
) -> None:
    serve = "import socket; s = socket.create_server(('', 900)); c, _ = s.accept(); c.sendall(b'up'); c.recv(1)"
    ask = "import socket; s = socket.create_connection(('two', 900), 1); print(s.recv(2).decode())"
    for _ in range(2):
        server = hosts["two"].start(["python3", "-c", serve])
        deadline = time.monotonic() + 30
        while (answer := hosts["one"].run(["python3", "-c", ask])).returncode:
            assert time.monotonic() < deadline, answer.stderr
        assert answer.stdout == "up\n"
        hosts["two"].kill()
        server.wait(timeout=30)
        assert hosts["one"].run(["python3", "-c", ask]).returncode == 1
        hosts.boot("two")


def test_nothing_outside_changes(tmp_path: Path) -> None:
    def outside() -> list[str]:
        links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
        return [
            Path("/etc/hosts").read_text(),
            links,
            subprocess.run(["hostname"], capture_output=True, text=True).stdout,
        ]

    before = outside()
    with Hosts(tmp_path / "hosts", ["one"]) as hosts:
        assert "one" in hosts["one"].check("cat /etc/hosts")
        during = outside()
        processes = list(hosts)
    assert before == during == outside()
    assert not any(host.is_up for host in processes)
