"""Runs on two hosts: DeepSpeed's launcher over ssh (plain, and through `llara-dist launch`) and elastic torchrun."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llara_dist.supervision.restarts import read_starts
from llara_dist.training.metrics_log import read_metrics
from tests.cluster import hosts as namespaces
from tests.cluster import ssh
from tests.cluster.hosts import Host, Hosts
from tests.runs import ROOT

pytestmark = [pytest.mark.long]

STEPS, FOR_EVER = 6, 10**6
ODD = "a b'\"$(touch x)`touch y`\\ é"
"""As a name and as a value: blanks, quotes, and what a shell would run."""
RANK = "-m llara_dist.cli train"
BIN = ROOT / ".venv" / "bin"
CONFIG = """
data: {epochs: 9999, global_batch_samples: 7, max_tokens_per_microbatch: 600, workers: 0}
lora: {dropout: 0.0}
faults: {heartbeat_s: 0.5, hang_timeout_s: 60}
device: cpu
"""


@dataclass
class Cluster:
    """Two hosts with ssh between them, on which runs are started from the first.

    Attributes:
        hosts: node-a and node-b.
        inputs: what every run reads.
        folder: for everything.
        hostfile: both hosts, one slot each.
    """

    hosts: Hosts
    inputs: Path
    folder: Path
    hostfile: Path

    def train(self, out: Path, steps: int, *more: str, config: Path | None = None) -> list[str | Path]:
        """Options of `llara-dist train` for a small run."""
        paths = ("--model.path", self.inputs / "llm", "--data.shards", self.inputs / "shards")
        paths += ("--recommender.path", self.inputs / "rec", "--out", out, "--data.max_steps", str(steps))
        return ["--config", config or self.folder / "run.yaml", *paths, *more]

    def launch(self, *options: str) -> list[str | Path]:
        """`llara-dist launch` with its own options."""
        return [BIN / "python", "-m", "llara_dist.cli", "launch", "--hostfile", self.hostfile, *options, "train"]

    def torchrun(self, nnodes: str, port: int) -> list[str | Path]:
        """Elastic torchrun, the same on every host."""
        rendezvous = ("--rdzv_backend=c10d", f"--rdzv_endpoint=node-a:{port}", f"--nnodes={nnodes}", "--max_restarts=3")
        return [BIN / "torchrun", *rendezvous, "--nproc_per_node=1", "launch/train.py"]

    def start(self, host: str, command: list[str | Path], **variables: str) -> Started:
        """Start a command on a host, in the checkout."""
        log = self.folder / f"{len(list(self.folder.glob('*.log')))}.log"
        with open(log, "w") as file:
            process = self.hosts[host].start(
                ["env", "-C", ROOT, *command],
                env={"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", **variables},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        return Started(process, log)

    def left(self, pattern: str) -> list[str]:
        """Processes on any host whose command line holds `pattern`."""
        return [f"{host.name}: {line}" for host in self.hosts if host.is_up for line in host.processes(pattern)]

    def wait_until_gone(self, pattern: str, hosts: Iterable[Host] = ()) -> None:
        """Wait until nothing on these hosts (all) matches: a rank's log relay may outlive the launcher for a moment."""
        deadline = time.monotonic() + 120
        while left := [line for host in hosts or self.hosts if host.is_up for line in host.processes(pattern)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)


@dataclass
class Started:
    """A command that runs on a host, and its output."""

    process: subprocess.Popen[str]
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text()

    def send(self, number: signal.Signals) -> None:
        """Signal the command itself, as a person does; not nsenter, which it runs under."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(children[0]), number)

    def wait_for_step(self, out: Path, step: int) -> None:
        deadline = time.monotonic() + 240
        while len(read_metrics(out / "metrics.jsonl")) <= step:
            assert time.monotonic() < deadline, f"the run does not get on\n{self.said}"
            assert self.process.poll() is None, self.said
            time.sleep(0.02)

    def wait(self, timeout_s: float = 240) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {timeout_s} s\n{self.said}") from None


@pytest.fixture(scope="module")
def cluster(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    lacking = namespaces.missing() or ssh.missing()
    if lacking and os.environ.get("CI"):
        pytest.fail(lacking)
    if lacking:
        pytest.skip(lacking)
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "run.yaml").write_text(CONFIG)
    hostfile = folder / "hosts.txt"
    hostfile.write_text("node-a slots=1  # rank 0\nnode-b slots=1\n")
    with Hosts(folder / "hosts", ["node-a", "node-b"]) as hosts:
        ssh.serve_all(hosts, folder / "ssh")
        yield Cluster(hosts, inputs, folder, hostfile)


@pytest.fixture(scope="module")
def plain(cluster: Cluster) -> Path:
    """The run of one plain process."""
    out = cluster.folder / "plain"
    started = cluster.start("node-a", [BIN / "python", "-m", "llara_dist.cli", "train", *cluster.train(out, STEPS)])
    assert started.wait() == 0, started.said
    return out


def require_same(run: Path, reference: Path, ranks: int) -> None:
    """Losses and final parameters of two runs are the same to rounding, and the run had so many ranks."""
    losses = [[row["loss"] for row in read_metrics(each / "metrics.jsonl")] for each in (run, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    last = f"checkpoints/step-{STEPS:08d}"
    assert f'"world_size": {ranks}' in (run / last / "state.json").read_text()
    for name in ("adapter_model.safetensors", "projector.safetensors"):
        ours, theirs = (load_file(each / last / name) for each in (run, reference))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert (ours[key] - value).norm() <= 1e-5 * value.norm(), key


def test_plain_deepspeed_over_pdsh(cluster: Cluster, plain: Path) -> None:
    out = cluster.folder / "deepspeed"
    started = cluster.start(
        "node-a",
        [BIN / "deepspeed", "--hostfile", cluster.hostfile, "launch/train.py", *cluster.train(out, STEPS)],
        PATH=f"{BIN}:{os.environ['PATH']}",
    )
    assert started.wait() == 0, started.said
    require_same(out, plain, 2)


def test_launch_where_each_host_takes_its_own_name_for_loopback(cluster: Cluster, plain: Path) -> None:
    """Debian's installer writes such /etc/hosts; gloo, left alone, then tells the other host to connect to itself."""
    out = cluster.folder / "launch"
    for host in cluster.hosts:
        others = "".join(f"{other.address} {other.name}\n" for other in cluster.hosts if other is not host)
        debian = cluster.folder / f"{host.name}.etc"
        debian.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{others}")
        host.check(f"mount --bind {debian} /etc/hosts")
    try:
        started = cluster.start("node-a", [*cluster.launch(), *cluster.train(out, STEPS, "--json")])
        assert started.wait() == 0, started.said
    finally:
        for host in cluster.hosts:
            host.check("umount /etc/hosts")
    require_same(out, plain, 2)
    assert any(line.startswith('{"out": ') for line in started.said.splitlines()), "rank 0's result has a prefix"


def test_torchrun_on_both_hosts(cluster: Cluster, plain: Path) -> None:
    out = cluster.folder / "torchrun"
    both = [
        cluster.start(name, [*cluster.torchrun("2", 29400), *cluster.train(out, STEPS)])
        for name in ("node-a", "node-b")
    ]
    for started in both:
        assert started.wait() == 0, started.said
    require_same(out, plain, 2)


def test_some_slots_of_one_host(cluster: Cluster, plain: Path) -> None:
    out = cluster.folder / "slots"
    hostfile = cluster.folder / "more hosts.txt"
    hostfile.write_text("node-a slots=8\nnode-b slots=8\n")
    command = cluster.launch("--hostfile", str(hostfile), "--num_nodes", "1", "--num-gpus", "2")
    started = cluster.start("node-b", [*command, *cluster.train(out, STEPS)])
    assert started.wait() == 0, started.said
    require_same(out, plain, 2)


def test_hosts_that_cannot_take_part_are_named_before_anything_starts(cluster: Cluster) -> None:
    out = cluster.folder / "never"
    hostfile = cluster.folder / "other.txt"

    def refusal(hosts: str) -> str:
        hostfile.write_text(hosts)
        started = cluster.start("node-a", [*cluster.launch("--hostfile", str(hostfile)), *cluster.train(out, STEPS)])
        assert started.wait() == 2, started.said
        assert len(started.said.splitlines()) == 1
        return started.said

    assert "other.txt, line 2: 'node-b gpus=8': expected `HOST slots=N`" in refusal("node-a slots=1\nnode-b gpus=8\n")
    said = refusal("node-a slots=1\nnode-x slots=1\n")
    assert said.startswith("error: node-x: not reached: ssh: Could not resolve hostname node-x")
    assert "nothing was started" in said
    other = cluster.folder / "llara_dist"
    shutil.copytree(ROOT / "llara_dist", other, ignore=shutil.ignore_patterns("__pycache__"))
    (other / "__init__.py").write_text((other / "__init__.py").read_text() + "# changed\n")
    both = "node-a slots=1\nnode-b slots=1\n"
    cluster.hosts["node-b"].check(f"mount --bind {other} {ROOT}/llara_dist")
    try:
        assert refusal(both).startswith(
            "error: node-b: other code of llara_dist than here; all hosts must run the same"
        )
    finally:
        cluster.hosts["node-b"].check(f"umount {ROOT}/llara_dist")
    cluster.hosts["node-b"].check(f"mount -t tmpfs none {ROOT}")
    try:
        assert refusal(both).startswith("error: node-b: cannot run llara_dist: ")
    finally:
        cluster.hosts["node-b"].check(f"umount {ROOT}")
    assert not out.exists()
    assert cluster.left("llara_dist.cluster.node") == []


def test_bad_input_of_the_run_ends_with_2(cluster: Cluster) -> None:
    started = cluster.start("node-a", [*cluster.launch(), *cluster.train(cluster.folder / "bad", STEPS, "--seed", "x")])
    assert started.wait() == 2
    assert "llara-dist train: " in started.said
    assert started.said.splitlines()[-1].endswith("bad input, said above; correct it and start again")


def test_ctrl_c_saves_and_ends_this_run_alone(cluster: Cluster, plain: Path) -> None:
    out, other = cluster.folder / ODD, cluster.folder / "other"
    config = cluster.folder / f"{ODD}.yaml"
    config.write_text(CONFIG)
    bystander = cluster.start("node-a", [*cluster.launch(), *cluster.train(other, FOR_EVER)])
    command = [*cluster.launch("--env", "MY_FLAG"), *cluster.train(out, FOR_EVER, config=config)]
    started = cluster.start("node-a", command, MY_FLAG=ODD, HF_TEST=ODD)
    started.wait_for_step(out, 1)
    bystander.wait_for_step(other, 1)
    for host in cluster.hosts:
        (rank,) = (line.split()[0] for line in host.processes(RANK) if str(config) in line)
        variables = host.check(f"cat /proc/{rank}/environ").split("\0")
        assert {f"MY_FLAG={ODD}", f"HF_TEST={ODD}"} <= set(variables)
    started.send(signal.SIGINT)
    assert started.wait() == 75, started.said
    assert "Ctrl-C again" in started.said
    assert cluster.left(str(config)) == []
    assert list((out / "checkpoints").glob("step-*"))
    assert not list(ROOT.glob("[xy]"))
    bystander.wait_for_step(other, len(read_metrics(other / "metrics.jsonl")) + 1)
    # One that does not answer any more is ended by a second one.
    cluster.hosts["node-b"].check(f"pkill -STOP -f -- '{RANK}'")
    bystander.send(signal.SIGINT)
    while "Ctrl-C again" not in bystander.said:
        time.sleep(0.02)
    bystander.send(signal.SIGINT)
    assert bystander.wait() == 130
    assert cluster.left("llara_dist.cli") + cluster.left("deepspeed.launcher") == []


def test_a_launcher_that_is_killed_leaves_nobody_behind(cluster: Cluster) -> None:
    out = cluster.folder / "orphans"
    started = cluster.start("node-a", [*cluster.launch(), *cluster.train(out, FOR_EVER)])
    started.wait_for_step(out, 1)
    started.send(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    for pattern in (str(out), "llara_dist.cluster.node"):
        cluster.wait_until_gone(pattern)
    assert list((out / "checkpoints").glob("step-*"))


def test_a_killed_rank_ends_the_run_with_70(cluster: Cluster) -> None:
    out = cluster.folder / "killed rank"
    started = cluster.start("node-a", [*cluster.launch(), *cluster.train(out, FOR_EVER)])
    started.wait_for_step(out, 1)
    cluster.hosts["node-b"].check(f"pkill -KILL -f -- '{RANK}'")
    assert started.wait() == 70, started.said
    assert "rank 1 of 2 on node-b" in started.said
    cluster.wait_until_gone("llara_dist")


@pytest.mark.parametrize("how", ["power cut", "network cut"])
def test_a_lost_host_ends_the_run_with_70_and_is_named(how: str, cluster: Cluster) -> None:
    out = cluster.folder / how
    lost = cluster.hosts["node-b"]
    command = cluster.launch("--alive_s", "1", "--grace_s", "10" if how == "power cut" else "1")
    started = cluster.start("node-a", [*command, *cluster.train(out, FOR_EVER)])
    started.wait_for_step(out, 1)
    if how == "power cut":
        lost.kill()
    else:
        cluster.hosts.unplug(lost.name)
    try:
        assert started.wait() == 70, started.said
        assert "error: node-b: lost" in started.said
        assert "--exclude node-b" in started.said
        cluster.wait_until_gone("llara_dist", [cluster.hosts["node-a"]])
    finally:
        restore(cluster, lost)


def restore(cluster: Cluster, lost: Host) -> None:
    """Bring a host back that lost its power or its network, with nothing on it running."""
    lost.kill()
    cluster.hosts.boot(lost.name)
    ssh.serve(lost, cluster.folder / "ssh")
    deadline = time.monotonic() + 30
    while cluster.hosts["node-a"].run(["ssh", lost.name, "true"]).returncode != 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.timeout(900)
def test_elastic_torchrun_goes_on_exactly_after_a_rank_was_killed(cluster: Cluster) -> None:
    whole, cut = cluster.folder / "whole", cluster.folder / "elastic"
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    steps = 60
    runs = {}
    for place, out in enumerate((whole, cut)):
        options = cluster.train(out, steps, "--resume", "auto", "--checkpoint.every_steps", "2")
        command = [*cluster.torchrun("1:2", 29410 + place), *options]
        runs[out] = [cluster.start(name, command, **variables) for name in ("node-a", "node-b")]
        if out is cut:
            runs[out][0].wait_for_step(out, 20)
            cluster.hosts["node-b"].check("pkill -KILL -f -- '-u launch/train.py'")
        for started in runs[out]:
            assert started.wait() == 0, started.said
    begun = [start.first_step for start in read_starts(cut)]
    assert len(begun) == 2, begun
    assert begun[1] >= 18
    last = f"checkpoints/step-{steps:08d}"
    for name in ("adapter_model.safetensors", "projector.safetensors", "optimizer.safetensors"):
        one, other = (load_file(out / last / name) for out in (whole, cut))
        assert all((value == other[key]).all() for key, value in one.items()), name
