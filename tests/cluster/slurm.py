"""A Slurm cluster of namespaced hosts: a controller, and nodes with two CPUs and two GPUs that are null devices each.

Two partitions: a job of `main` pre-empts those of `low`, which are requeued. Times are short: a node counts as lost
after some ten seconds, a requeued job starts again after some five. Nothing needs systemd or cgroups, and nothing
outside the folder and the hosts' namespaces changes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.cluster import hosts
from tests.cluster.hosts import Host, Hosts

CONTROLLER = "head"
CPUS, GPUS, MEMORY_MIB = 2, 2, 4096
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=5
UnkillableStepTimeout=30
KillWait={kill_wait_s}
MinJobAge=3600
JobRequeue=1
RequeueExit={requeue_exit}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
GresTypes=gpu
NodeName={nodes} CPUs={cpus} Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory={memory} Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF MaxTime=1:00:00 DefaultTime=30
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=1:00:00 DefaultTime=30
"""
_STATES = re.compile(r"(\w+)=(.*?)(?=\s+[\w:/]+=|$)")


def missing() -> str:
    """Why there can be no Slurm here; "" where there can."""
    lacking = [command for command in ("slurmctld", "slurmd", "sbatch", "munged") if _which(command) is None]
    return f"{', '.join(lacking)} not found: bash tests/cluster/setup.sh" if lacking else hosts.missing()


class Slurm:
    """A cluster, up between `with` and its end.

    Attributes:
        hosts: the controller, from which commands are given, and the nodes.

    Args:
        folder: for everything that belongs to it; made here.
        nodes: their names.
        kill_wait_s: seconds between SIGTERM and SIGKILL.
        requeue_exit: the exit code with which Slurm requeues a job by itself.
    """

    def __init__(
        self, folder: Path, nodes: Sequence[str] = ("n1", "n2", "n3"), kill_wait_s: int = 20, requeue_exit: int = 75
    ) -> None:
        self.folder = folder
        self.nodes = tuple(nodes)
        folder.mkdir(parents=True)
        for name in ("etc", "state", "spool", "log", "dev"):
            (folder / name).mkdir()
        self.hosts = Hosts(folder / "hosts", [CONTROLLER, *nodes])
        text = _CONFIGURATION.format(
            controller=CONTROLLER,
            folder=folder,
            kill_wait_s=kill_wait_s,
            requeue_exit=requeue_exit,
            nodes=",".join(nodes),
            cpus=CPUS,
            memory=MEMORY_MIB,
            gpus=GPUS,
        )
        (folder / "etc" / "slurm.conf").write_text(text)
        for number in range(GPUS):
            os.mknod(folder / "dev" / f"gpu{number}", 0o20666, os.makedev(1, 3))
        (folder / "etc" / "gres.conf").write_text(f"Name=gpu File={folder}/dev/gpu[0-{GPUS - 1}]\n")
        key = folder / "etc" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self._environment = {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}

    def __enter__(self) -> Self:
        self.hosts.__enter__()
        try:
            for host in self.hosts:
                self._start_daemons(host)
            self.wait(lambda: all(state == "IDLE" for state in self.states().values()), 60, "every node is idle")
        except BaseException:
            self.hosts.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.hosts.__exit__(*exception)

    def boot(self, node: str) -> None:
        """Bring a node up that was killed, and wait until it can be used."""
        self._start_daemons(self.hosts.boot(node))
        self.wait(lambda: self.states()[node] == "IDLE", 60, f"{node} is idle")

    def _start_daemons(self, host: Host) -> None:
        munge = f"--key-file={self.folder}/etc/munge.key --log-file={self.folder}/log/munged.{host.name}.log"
        host.check(f"{_which('munged')} {munge} --pid-file=/run/munged.pid --seed-file=/run/munged.seed")
        host.check(str(_which("slurmctld" if host.name == CONTROLLER else "slurmd")), env=self._environment)

    def command(self, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on the controller, as a user on a login node would."""
        options["env"] = {**self._environment, **options.get("env", {})}
        return self.hosts[CONTROLLER].run(list(words), **options)

    def check(self, *words: str | Path, **options: Any) -> str:
        """A command that must succeed; returns its stdout."""
        done = self.command(*words, **options)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self, *words: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start a command on the controller and do not wait for it."""
        options["env"] = {**self._environment, **options.get("env", {})}
        return self.hosts[CONTROLLER].start(list(words), **options)

    def submit(self, *arguments: str | Path, **options: Any) -> str:
        """sbatch; returns the job's id."""
        return self.check("sbatch", "--parsable", *arguments, **options).strip().partition(";")[0]

    def job(self, job: str) -> Mapping[str, str]:
        """What `scontrol show job` says of it: JobState, Reason, Restarts, ExitCode, NodeList, ExcNodeList, …"""
        return dict(_STATES.findall(self.check("scontrol", "--oneliner", "show", "job", job)))

    def state(self, job: str) -> str:
        """The job's state, e.g. PENDING."""
        return self.job(job)["JobState"]

    def states(self) -> dict[str, str]:
        """Every node's state, e.g. IDLE, DOWN+NOT_RESPONDING."""
        lines = self.check("scontrol", "--oneliner", "show", "nodes").splitlines()
        nodes = (dict(_STATES.findall(line)) for line in lines)
        return {node["NodeName"]: node["State"] for node in nodes}

    def end(self, job: str, limit_s: float = 400) -> str:
        """Wait until the job has ended for good; returns its state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
        self.wait(lambda: self.state(job) in ended, limit_s, f"job {job} has ended")
        return self.state(job)

    def wait(self, condition: Callable[[], object], limit_s: float, what: str) -> None:
        """Wait until a condition holds; if it does not, the jobs and the ends of the logs are shown."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {limit_s} s: {what}\n{self.report()}"
            time.sleep(0.2)

    def report(self) -> str:
        """Jobs, nodes and the last lines of the daemons' logs."""
        said = [self.command("scontrol", "show", what).stdout for what in ("jobs", "nodes")]
        for log in sorted((self.folder / "log").iterdir()):
            said.append("\n".join([f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-25:]]))
        return "\n".join(said)


def _which(command: str) -> str | None:
    return shutil.which(command, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
