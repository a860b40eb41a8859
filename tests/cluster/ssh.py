"""An sshd on each host: `ssh node-b`, `pdsh -w node-b` and `deepspeed --hostfile` work on them unmodified."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from tests.cluster.hosts import Host, Hosts

SSHD = "/usr/sbin/sshd"
_SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/id.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 64
"""
_SSH_CONFIG = """
BatchMode yes
IdentityFile ~/.ssh/id
StrictHostKeyChecking accept-new
LogLevel ERROR
"""


def missing() -> str:
    """What ssh between hosts lacks here; "" where nothing."""
    lacking = [command for command in (SSHD, "ssh", "ssh-keygen", "pdsh") if shutil.which(command) is None]
    return f"{', '.join(lacking)} not found: bash tests/cluster/setup.sh" if lacking else ""


def make_keys(folder: Path) -> None:
    """One key pair for the user and one for all hosts, and the server's configuration."""
    folder.mkdir()
    for name in ("host_key", "id"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(_SSHD_CONFIG.format(folder=folder))


def serve(host: Host, folder: Path) -> None:
    """Start the host's sshd, also after it was booted again, and give its user the key."""
    shutil.copy(folder / "id", host.home / "id")
    (host.home / "config").write_text(_SSH_CONFIG)
    with open(folder / f"{host.name}.log", "w") as log:
        host.start([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stdout=log, stderr=log)


def serve_all(hosts: Hosts, folder: Path) -> None:
    """Start an sshd on every host and return once each answers the first one."""
    make_keys(folder)
    for host in hosts:
        serve(host, folder)
    first = next(iter(hosts))
    for host in hosts:
        deadline = time.monotonic() + 30
        while (done := first.run(["ssh", host.name, "true"])).returncode != 0:
            assert time.monotonic() < deadline, done.stderr + (folder / f"{host.name}.log").read_text()
            time.sleep(0.1)
