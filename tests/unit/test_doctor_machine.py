"""Doctor's findings about processor, libraries, network, folders and Slurm, from facts made here or probed."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llara_dist.cluster.site import VARIABLE
from llara_dist.console import GIB
from llara_dist.doctor import libraries, network, processor, scheduler, storage
from llara_dist.doctor.bounded import ProbeError, call
from llara_dist.doctor.gpu_facts import GpuFacts, TorchGpus
from llara_dist.doctor.processor import ProcessorFacts
from llara_dist.doctor.scheduler import COMMANDS, SlurmFacts
from llara_dist.doctor.storage import FolderFacts, WriteFacts
from llara_dist.errors import Finding

NODE = ProcessorFacts(cores=64, quota=None, threads="4", bf16=True, free=256 * GIB)
FOLDER = FolderFacts("/data", writable=True, free=500 * GIB, inodes=10**7, kind="ext4", source="/dev/sda1")
WRITTEN = WriteFacts(seconds=0.1, renamed=True, locked=True)


def only(findings: list[Finding], severity: str) -> list[str]:
    return [finding.line for finding in findings if finding.severity == severity]


# Processor and memory


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (replace(NODE, cores=8), "8 cores for 8 ranks with 2 data workers each"),
        (replace(NODE, quota=4.0, threads="1"), "64 cores, time for 4 of them"),
        (replace(NODE, threads=""), "each of 8 ranks starts 64 threads; export OMP_NUM_THREADS=8"),
        (replace(NODE, threads="16"), "OMP_NUM_THREADS=16 for 8 ranks on 64 cores"),
        (replace(NODE, free=8 * GIB), "8.0 GiB free; a rank takes about 4 GiB"),
    ],
)
def test_a_node_that_is_too_small(facts: ProcessorFacts, says: str) -> None:
    assert says in only(processor.examine(facts, 8, 8), "warning")[0]


def test_a_large_node_passes() -> None:
    assert {finding.severity for finding in processor.examine(NODE, 8, 8)} == {"passed"}
    assert "not in hardware" in processor.examine(replace(NODE, bf16=False), 8, 0)[-1].found
    assert only(processor.examine(replace(NODE, free=GIB // 2), 1, 1), "error")


def test_the_quota_of_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/user/job\n")
    (tmp_path / "groups" / "user" / "job").mkdir(parents=True)
    assert processor.read_quota(tmp_path / "groups", own) is None
    (tmp_path / "groups" / "user" / "job" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "groups" / "user" / "cpu.max").write_text("250000 100000\n")
    assert processor.read_quota(tmp_path / "groups", own) == 2.5
    own.write_text("4:cpu,cpuacct:/job\n0::/\n")
    (tmp_path / "groups" / "cpu" / "job").mkdir(parents=True)
    (tmp_path / "groups" / "cpu" / "job" / "cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "groups" / "cpu" / "job" / "cpu.cfs_period_us").write_text("100000\n")
    assert processor.read_quota(tmp_path / "groups", own) == 1.5


# Libraries


def test_imports_are_tried_one_by_one() -> None:
    problems = libraries.try_imports(["json", "llara_dist_nothing"])
    assert list(problems) == ["llara_dist_nothing"]
    (finding,) = libraries.check_imports(problems)
    assert finding.severity == "error"
    assert "ModuleNotFoundError" in finding.found
    assert libraries.check_imports({})[0].severity == "passed"


def test_quantising_really_runs_and_a_wrong_result_is_seen() -> None:
    tried = libraries.try_bitsandbytes()
    assert 0.1 < tried["error"] <= libraries.NF4_ERROR
    assert libraries.check_bitsandbytes(tried)[0].severity == "passed"
    assert libraries.check_bitsandbytes({"device": "cuda", "error": 1.0})[0].severity == "error"


def test_a_step_that_moves_nothing_is_an_error() -> None:
    assert libraries.check_deepspeed({"device": "cpu", "moved": True})[0].severity == "passed"
    assert libraries.check_deepspeed({"device": "cpu", "moved": False})[0].severity == "error"


def test_optional_libraries() -> None:
    here = {"flash-attn": "2.8.3", "liger-kernel": None}
    old = GpuFacts(torch=TorchGpus("13.0", True, [{"capability": [7, 5]}]))
    found = libraries.check_optional(here, {}, GpuFacts())
    assert [finding.severity for finding in found] == ["passed", "skipped"]
    assert "compute capability 8.0" in only(libraries.check_optional(here, {}, old), "warning")[0]
    broken = {"flash_attn": "ImportError: undefined symbol"}
    assert "undefined symbol; build it again" in only(libraries.check_optional(here, broken, GpuFacts()), "warning")[0]


def test_locks_of_killed_compilations(tmp_path: Path) -> None:
    old, fresh = tmp_path / "py311_cpu" / "shm" / "lock", tmp_path / "py311_cpu" / "adam" / "lock"
    for lock in (old, fresh):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    assert libraries.stale_locks(tmp_path, time.time()) == [old]
    (finding,) = libraries.check_compilers(False, [str(old)])
    assert (finding.severity, finding.remedy) == ("warning", f"rm '{old}'")


def test_compilers() -> None:
    assert "Triton" in only(libraries.check_compilers(True, [], which=lambda _: None), "warning")[0]
    assert libraries.check_compilers(False, [], which=lambda _: None)[0].severity == "passed"
    assert libraries.check_compilers(True, [], which=lambda name: f"/usr/bin/{name}")[0].severity == "passed"


# Network


@pytest.mark.parametrize(
    ("resolved", "severity", "says"),
    [
        (["10.0.0.5"], "passed", "node-a is 10.0.0.5"),
        (["127.0.1.1"], "warning", "127.0.1.1, reached from here only"),
        (["127.0.1.1", "10.0.0.5"], "passed", "10.0.0.5"),
        (["::1"], "warning", "reached from here only"),
        ([], "warning", "node-a does not resolve"),
        (["10.9.9.9"], "warning", "no address of this host"),
    ],
)
def test_the_host_name(resolved: list[str], severity: str, says: str) -> None:
    (finding,) = network.check_host_name("node-a", resolved, ["127.0.0.1", "::1", "10.0.0.5"])
    assert finding.severity == severity
    assert says in finding.found


def test_two_ranks_add_rightly() -> None:
    tried = call(network.try_pair, 60.0, backend="gloo")
    assert tried["right"]
    (finding,) = network.check_reduction(**tried, ranks=2, backend="gloo")
    assert finding.severity == "passed"
    assert network.check_reduction(0.1, False, 2, "nccl")[0].severity == "error"


def test_a_backend_that_is_not_there_is_said() -> None:
    with pytest.raises(ProbeError, match="nccl"):
        call(network.try_pair, 60.0, backend="nccl")


def test_bandwidth_is_that_of_a_rank() -> None:
    assert network.bandwidth(1.0, 2) == 16 << 20
    assert network.bandwidth(1.0, 4) == 1.5 * (16 << 20)


# Folders


@pytest.mark.parametrize(
    ("folder", "place"),
    [
        ("/home/u/runs", ("nfs4", "server:/export/home")),
        ("/home", ("nfs4", "server:/export/home")),
        ("/homer", ("ext4", "/dev/vda")),
        ("/a b/c", ("tmpfs", "late")),
        ("/", ("ext4", "/dev/vda")),
    ],
)
def test_the_mount_of_a_folder(folder: str, place: tuple[str, str]) -> None:
    mountinfo = (
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        "30 27 0:40 / /home rw,relatime shared:7 master:2 - nfs4 server:/export/home rw,vers=4.2\n"
        "31 27 0:41 / /a\\040b rw - tmpfs early rw\n32 31 0:42 / /a\\040b rw - tmpfs late rw\n"
    )
    assert storage.mounted(Path(folder), mountinfo) == place


@pytest.mark.parametrize(
    ("changes", "severity", "says"),
    [
        ({}, "passed", "500 GiB free on ext4"),
        ({"writable": False}, "error", "not writable by this user"),
        ({"free": 1 << 20}, "error", "1 MiB free"),
        ({"free": GIB}, "warning", "1024 MiB free"),
        ({"inodes": 3}, "error", "only 3 more files"),
        ({"inodes": None}, "passed", "ext4"),
    ],
)
def test_room(changes: dict, severity: str, says: str) -> None:
    (finding,) = storage.check_room("run folder", "/data", replace(FOLDER, **changes))
    assert finding.severity == severity
    assert says in finding.found
    (other,) = storage.check_room("home", "~", replace(FOLDER, **changes), needed=False)
    assert other.severity == ("warning" if severity == "error" else severity)


@pytest.mark.parametrize(
    ("kind", "source", "severity", "says"),
    [
        ("ext4", "/dev/sda1", "passed", "a disk of this node"),
        ("nfs4", "server:/x", "passed", "only after a minute"),
        ("lustre", "mds@o2ib:/scratch", "passed", "shared by nodes"),
        ("tmpfs", "tmpfs", "warning", "memory"),
        ("overlay", "overlay", "warning", "gone with the container"),
        ("fuse.s3fs", "s3fs", "error", "renaming is not atomic"),
        ("fuse", "gcsfuse", "error", "renaming is not atomic"),
    ],
)
def test_kinds_of_file_systems(kind: str, source: str, severity: str, says: str) -> None:
    (finding,) = storage.check_kind("file system", replace(FOLDER, kind=kind, source=source))
    assert finding.severity == severity
    assert says in finding.found


def test_what_writing_gave() -> None:
    assert storage.check_writing("writing", FOLDER, WRITTEN)[0].severity == "passed"
    assert "13 MB/s" in only(storage.check_writing("writing", FOLDER, replace(WRITTEN, seconds=5.0)), "warning")[0]
    assert "flock" in only(storage.check_writing("writing", FOLDER, replace(WRITTEN, locked=False)), "warning")[0]
    assert "renaming" in only(storage.check_writing("writing", FOLDER, replace(WRITTEN, renamed=False)), "error")[0]


def test_writing_is_tried_and_leaves_nothing(tmp_path: Path) -> None:
    left = tmp_path / f"{storage.PREFIX}old"
    left.touch()
    os.utime(left, (time.time() - 7200,) * 2)
    tried = WriteFacts(**storage.try_writing(str(tmp_path), f"{storage.PREFIX}now"))
    assert (tried.renamed, tried.locked) == (True, True)
    assert list(tmp_path.iterdir()) == []


def test_folders_are_looked_at_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "file").touch()
    out = tmp_path / "a b'$(touch x)%" / "run"
    found = storage.examine(out, quick=False)
    assert only(found, "error") == []
    assert any(finding.check == "writing" for finding in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    assert "file is no folder" in only(storage.examine(tmp_path / "file", quick=True), "error")[0]


# Slurm


CONFIG = """\
Configuration data as of 2026-01-01T00:00:00
GresTypes               = gpu
JobRequeue              = 1
KillWait                = 60 sec
PreemptMode             = REQUEUE
RequeueExit             = (null)
SLURM_VERSION           = 23.11.4
Slurmctld(primary) at login is UP
"""
PARTITIONS = [("gpu*", "up", "8", "gpu:h100:8", "1-00:00:00"), ("old", "down", "2", "(null)", "infinite")]
SLURM = SlurmFacts((), (23, 11), settings=scheduler.parse_settings(CONFIG), partitions=PARTITIONS)


def test_slurm_as_it_should_be() -> None:
    assert SLURM.settings["SLURM_VERSION"] == "23.11.4"
    assert scheduler.parse_version("24.05.3-1") == (24, 5)
    assert scheduler.check_slurm(SLURM, "7@c")[0] == Finding("Slurm", "23.11.4, in job 7@c", severity="passed")
    assert scheduler.check_requeueing(SLURM.settings)[0].severity == "passed"
    assert scheduler.check_partitions(PARTITIONS, "gpu", "gpus-per-node") == [
        Finding("partitions", "gpu* (up to 1-00:00:00)", severity="passed")
    ]


@pytest.mark.parametrize(
    ("facts", "severity", "says"),
    [
        (SlurmFacts(), "skipped", "its commands are not here"),
        (SlurmFacts(["sbatch"]), "warning", "not here: sbatch"),
        (SlurmFacts((), error="Unable to contact slurm controller"), "warning", "does not answer"),
        (SlurmFacts((), error="Could not establish a configuration source"), "skipped", "no cluster is configured"),
        (replace(SLURM, version=(21, 8)), "warning", "older than 22.05"),
    ],
)
def test_slurm_that_is_not(facts: SlurmFacts, severity: str, says: str) -> None:
    (finding,) = scheduler.check_slurm(facts, "")
    assert finding.severity == severity
    assert says in finding.found


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("KillWait", "5 sec", "a checkpoint may not be done"),
        ("JobRequeue", "0", "submit with --requeue"),
        ("PreemptMode", "CANCEL", "cancelled, not requeued"),
        ("PreemptMode", "GANG,SUSPEND", "suspended"),
        ("RequeueExit", "1-3,75", "restarts jobs that end with 2"),
    ],
)
def test_settings_that_lose_jobs(name: str, value: str, says: str) -> None:
    (finding,) = scheduler.check_requeueing({**SLURM.settings, name: value})
    assert finding.severity == "warning"
    assert says in finding.line


def test_partitions_without_gpus() -> None:
    bare = [("all*", "up", "2", "(null)", "infinite")]
    assert "gpus: none" in only(scheduler.check_partitions(bare, "(null)", "gres"), "warning")[0]
    assert only(scheduler.check_partitions(bare, "(null)", "none"), "warning") == []
    assert only(scheduler.check_partitions(PARTITIONS[1:], "gpu", "gres"), "error")


def test_slurm_commands_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMMANDS:
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\ncat <<'END'\n{CONFIG}END\n")
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'gpu*|up|8|gpu:h100:8|1-00:00:00'\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    facts = scheduler.probe()
    assert (list(facts.missing), facts.version, facts.error) == ([], (23, 11), "")
    assert facts.partitions == PARTITIONS[:1]
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(scheduler, "ANSWERS_S", 0.2)
    assert "no answer within" in scheduler.probe().error


def test_the_site_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "site.yaml"))
    (tmp_path / "site.yaml").write_text("gpus: none\n")
    assert scheduler.check_site(SLURM)[1] == "none"
    (tmp_path / "site.yaml").write_text("partitoin: gpu\n")
    assert "partitoin" in only(scheduler.check_site(SLURM)[0], "error")[0]


def test_cores_that_srun_gave_one_rank_are_for_that_rank() -> None:
    bound = replace(NODE, cores=12, threads="12", own=True)
    assert [finding.severity for finding in processor.check_cores(bound, 8)] == ["passed"]
    assert "warning" in [finding.severity for finding in processor.check_cores(replace(bound, own=False), 8)]
