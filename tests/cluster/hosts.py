"""Hosts on one machine: network, process, mount and name namespaces of their own, one network between them.

A host has its own host name, address, /etc/hosts, /run, ~/.ssh and process ids; files are shared, as on a cluster's
shared file system. Nothing outside the namespaces changes: not /etc/hosts, not the machine's interfaces or ports.
`Host.kill` ends a host as a power cut does: every process at once, and its network with them.

Linux only, as root; needs util-linux (unshare, nsenter, setpriv) and iproute2 (namespaces(7), veth(4)).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

NETWORK = "10.77.0"
INTERFACE = "eth0"
HOME = pwd.getpwuid(os.geteuid()).pw_dir
"""where ssh looks for its files, whatever the variable says"""
_ALONE = ("--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc")
_DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL")
# The first process of a process namespace inherits its orphans; with SIGCHLD ignored the kernel reaps them.
_INIT = "import signal, time; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True: time.sleep(3600)"


def missing() -> str:
    """Why hosts cannot be made here; "" where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces need root on Linux"
    lacking = [command for command in ("unshare", "nsenter", "setpriv", "ip") if shutil.which(command) is None]
    if lacking:
        return f"{', '.join(lacking)} not found: bash tests/cluster/setup.sh"
    probe = subprocess.run(
        ["unshare", *_ALONE, "ip", "link", "add", "type", "veth"],
        capture_output=True,
        text=True,
    )
    return "" if probe.returncode == 0 else f"no namespaces here: {probe.stderr.strip()}"


class Host:
    """One host; made by `Hosts`.

    Attributes:
        name: host name.
        address: IPv4 address, which every host resolves the name to.
        home: folder that lies over ~/.ssh on this host alone.
    """

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address = name, address
        self._folder = folder
        self.home = folder / f"{name}.ssh"
        self.home.mkdir(mode=0o700)
        self._outer: subprocess.Popen[bytes] | None = None
        self._init = 0

    def boot(self, switch: int) -> None:
        """Bring the host up, also again after `kill`, and plug it into the network of process `switch`."""
        self._outer = subprocess.Popen(
            [*_DIE_WITH_US, "unshare", *_ALONE, "--kill-child=KILL", sys.executable, "-c", _INIT],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        deadline = time.monotonic() + 30
        while not (found := children.read_text().split()):
            assert self._outer.poll() is None, f"{self.name} does not start"
            assert time.monotonic() < deadline, f"{self.name} does not start"
            time.sleep(0.01)
        self._init = int(found[0])
        number = self.address.rpartition(".")[2]
        port, hardware = f"v{number}", f"02:00:00:00:00:{int(number):02x}"  # the others' caches know a host by both
        # The end of a host that was killed goes away a moment after it.
        _in(
            switch,
            "net",
            f"ip link delete {port} 2>/dev/null; ip link add {port} type veth peer name {INTERFACE} address {hardware} "
            f"netns {self._init} && ip link set {port} master bridge up",
        )
        _in(
            self._init,
            "net",
            f"ip link set lo up && ip addr add {self.address}/24 dev {INTERFACE} && ip link set {INTERFACE} up",
        )
        ssh = Path(HOME) / ".ssh"
        ssh.mkdir(mode=0o700, exist_ok=True)
        self.check(
            f"hostname {self.name} && mount -t tmpfs run /run && mkdir -p /run/sshd /run/munge /run/etc && "
            # All of /etc: a mount over one file goes away when somebody puts another file in its place.
            f"cp -a /etc/. /run/etc && cp {self._folder}/hosts /run/etc/hosts && mount --bind /run/etc /etc && "
            f"mount --bind {self.home} {ssh}"
        )

    @property
    def is_up(self) -> bool:
        """Whether it runs."""
        return self._outer is not None and self._outer.poll() is None

    def start(self, command: Sequence[str | Path], **options: Any) -> subprocess.Popen[str]:
        """Start a command on the host, in a process group of its own: `os.killpg(process.pid, …)` reaches it.

        Args:
            command: argument vector; its first word is looked up on PATH.
            options: of subprocess.Popen. HOME is the user's own; no variable of a launcher or scheduler is passed.
        """
        assert self.is_up, f"{self.name} is down"
        environment = options.pop("env", None)
        place = options.pop("cwd", os.getcwd())  # to enter a mount namespace is to stand at its root
        return subprocess.Popen(
            [*_enter(self._init, "net", "mount", "uts", "pid"), "env", "-C", str(place), *map(str, command)],
            env=clean_environment(environment),
            text=True,
            start_new_session=True,
            **{"stdin": subprocess.DEVNULL, **options},
        )

    def run(
        self, command: Sequence[str | Path], timeout_s: float = 120, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the host and wait for it; its output is captured, its exit code is not looked at."""
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise AssertionError(f"{self.name}: {command} ran longer than {timeout_s} s\n{out}\n{err}") from None
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def check(self, script: str, **options: Any) -> str:
        """Run a shell script at the root, where it is in no mount's way, that must succeed; returns its stdout."""
        done = self.run(["bash", "-c", script], **{"cwd": "/", **options})
        assert done.returncode == 0, f"{self.name}: {script}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def processes(self, pattern: str = "") -> list[str]:
        """The command lines of the host's processes that contain `pattern`; of this call's own, none."""
        found = self.run(["ps", "-eo", "pid=,args=", "-ww"]).stdout.splitlines()
        return [line.strip() for line in found if pattern in line and "ps -eo" not in line and _INIT[:20] not in line]

    def kill(self) -> None:
        """End every process of the host at once, as a power cut does; its network is gone with them."""
        if self._outer is not None:
            self._outer.kill()
            self._outer.wait()


class Hosts:
    """Some hosts, up between `with` and its end.

    Args:
        folder: for what belongs to them; made here.
        names: of the hosts; the first has address 10.77.0.11.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        folder.mkdir(parents=True)
        addresses = [f"{NETWORK}.{11 + place}" for place in range(len(names))]
        lines = ["127.0.0.1 localhost", *(f"{a} {n}" for a, n in zip(addresses, names, strict=True))]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        self._hosts = {n: Host(n, a, folder) for n, a in zip(names, addresses, strict=True)}
        self._switch: subprocess.Popen[bytes] | None = None

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def boot(self, name: str) -> Host:
        """Bring a host up that was killed."""
        assert self._switch is not None
        self._hosts[name].boot(self._switch.pid)
        return self._hosts[name]

    def unplug(self, name: str) -> None:
        """Cut a host's cable: its processes go on, nobody reaches them."""
        self._cable(name, "down")

    def plug(self, name: str) -> None:
        """Put the cable back."""
        self._cable(name, "up")

    def _cable(self, name: str, state: str) -> None:
        assert self._switch is not None
        _in(self._switch.pid, "net", f"ip link set v{self[name].address.rpartition('.')[2]} {state}")

    def __enter__(self) -> Self:
        self._switch = subprocess.Popen(
            [*_DIE_WITH_US, "unshare", "--net", "sleep", "infinity"], stdin=subprocess.DEVNULL, start_new_session=True
        )
        ours = os.readlink("/proc/self/ns/net")
        deadline = time.monotonic() + 30
        while os.readlink(f"/proc/{self._switch.pid}/ns/net") == ours:
            assert time.monotonic() < deadline, "unshare --net does not start"
            time.sleep(0.01)
        try:
            _in(self._switch.pid, "net", "ip link set lo up; ip link add bridge type bridge && ip link set bridge up")
            for host in self:
                host.boot(self._switch.pid)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for host in self:
            host.kill()
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()


def clean_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's variables without those of launchers and schedulers, and with those given."""
    dropped = (
        "SLURM_",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "MASTER_",
        "LLARA_DIST_INIT",
        "PYTEST_",
        "GLOO_",
        "TORCHELASTIC",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "HOME": HOME, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(environment or {})}


def _enter(pid: int, *namespaces: str) -> list[str]:
    return ["nsenter", "--target", str(pid), *(f"--{name}" for name in namespaces), "--"]


def _in(pid: int, namespace: str, script: str) -> None:
    done = subprocess.run([*_enter(pid, namespace), "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, f"{script}\n{done.stderr}"
