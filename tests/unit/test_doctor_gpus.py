"""Doctor's findings about GPUs and their links, from what nvidia-smi, torch and Linux say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llara_dist.console import GIB
from llara_dist.doctor import gpu_facts, gpus, links
from llara_dist.doctor.gpu_facts import Gpu, GpuFacts, TorchGpus
from llara_dist.doctor.links import LinkFacts, Port

SMI = """\
0, GPU-aaaa, NVIDIA H100 80GB HBM3, 81559, 4, 580.82.07, 9.0, Enabled, 0, Disabled
1, GPU-bbbb, NVIDIA H100 80GB HBM3, 81559, 30211, 580.82.07, 9.0, Disabled, 3, Enabled
"""
OLD_SMI = "0, GPU-cccc, Tesla V100-SXM2-32GB, 32510, 0, 470.57.02, [N/A], Enabled, [N/A], [N/A]\n"
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPXB\t0-31\t0
GPU1\tNV18\t X \tNODE\tSYS\t0-31\t0
GPU2\tSYS\tNODE\t X \tSYS\t32-63\t1
NIC0\tPXB\tSYS\tSYS\t X \t\t

Legend:
  X    = Self
"""
H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "memory": 80 * GIB, "problem": ""}
CHIP = Gpu(0, "GPU-aaaa", "NVIDIA H100 80GB HBM3", 80 * GIB, 0, "580.82.07", (9, 0), True, 0)
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
SOUND = GpuFacts(gpus=[CHIP], torch=TorchGpus("13.0", True, [H100], ARCHITECTURES, "2.27.7"), device_files=True)


def severities(findings: list) -> dict[str, str]:
    return {finding.check: finding.severity for finding in findings}


def only(findings: list, severity: str) -> list[str]:
    return [finding.line for finding in findings if finding.severity == severity]


def test_nvidia_smi_is_read() -> None:
    first, second = gpu_facts.parse_gpus(SMI)
    assert first == Gpu(0, "GPU-aaaa", "NVIDIA H100 80GB HBM3", 81559 << 20, 4 << 20, "580.82.07", (9, 0), True, 0)
    assert (second.persistence, second.ecc_errors, second.mig) == (False, 3, True)
    (old,) = gpu_facts.parse_gpus(OLD_SMI)
    assert (old.capability, old.ecc_errors, old.mig, old.memory) == (None, None, False, 32510 << 20)
    assert gpu_facts.parse_gpus("No devices were found\n") == []


def test_processes_and_driver_errors_are_read() -> None:
    assert gpu_facts.parse_processes("GPU-aaaa, 4711, /usr/bin/python\n\n") == [("GPU-aaaa", 4711, "/usr/bin/python")]
    log = "[12.3] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\n[13.0] usb 1-1: new device\n"
    assert gpu_facts.parse_xids(log) == [("0000:3b:00", 79)]


def test_a_sound_node_passes() -> None:
    findings = gpus.examine(SOUND)
    assert set(severities(findings).values()) == {"passed"}
    assert {"driver", "GPUs", "computing", "state"} == set(severities(findings))


@pytest.mark.parametrize(
    ("changes", "severity", "says"),
    [
        ({"gpus": None, "torch": TorchGpus(), "device_files": False}, "warning", "CPU only"),
        ({"gpus": None, "torch": TorchGpus("13.0")}, "error", "docker --gpus all"),
        ({"gpus": [], "smi_error": "Driver/library version mismatch", "torch": TorchGpus()}, "error", "mismatch"),
        ({"torch": TorchGpus(error="ImportError: libcudart.so.13")}, "error", "libcudart"),
        ({"torch": TorchGpus()}, "error", "install torch's CUDA build"),
        ({"torch": TorchGpus("13.0"), "visible": ""}, "error", "CUDA_VISIBLE_DEVICES"),
        ({"torch": TorchGpus("13.0")}, "error", "torch finds no usable GPU among 1"),
        ({"smi_error": "no answer within 30 s (nvidia-smi)"}, "warning", "no answer within 30 s"),
        ({"processes": [("GPU-aaaa", 7, "python")]}, "warning", "python (pid 7)"),
        ({"xids": [("0000:3b:00", 79)] * 9}, "warning", "Xid 79 at PCI 0000:3b:00 in"),
    ],
)
def test_what_is_wrong_with_gpus_is_said(changes: dict, severity: str, says: str) -> None:
    said = only(gpus.examine(replace(SOUND, **changes)), severity)
    assert len(said) == 1
    assert says in said[0]


@pytest.mark.parametrize(
    ("chip", "severity", "says"),
    [
        ({"driver": "550.54.15"}, "error", "too old for torch's CUDA 13.0: needs ≥ 580.65"),
        ({"used": 40 * GIB}, "warning", "cannot be seen from here"),
        ({"ecc_errors": 3}, "error", "3 uncorrected memory errors"),
        ({"persistence": False}, "warning", "nvidia-smi -pm 1"),
        ({"mig": True}, "warning", "MIG"),
    ],
)
def test_what_nvidia_smi_says_against_a_gpu(chip: dict, severity: str, says: str) -> None:
    (said,) = only(gpus.examine(replace(SOUND, gpus=[replace(CHIP, **chip)])), severity)
    assert says in said


def test_the_oldest_driver_that_will_do_passes() -> None:
    assert severities(gpus.check_driver(replace(SOUND, gpus=[replace(CHIP, driver="580.65.06")]))) == {
        "driver": "passed"
    }


def test_what_torch_finds_on_the_gpus() -> None:
    def of(*devices: dict, architectures: list[str] = ARCHITECTURES) -> list:
        return gpus.examine(replace(SOUND, torch=TorchGpus("13.0", True, devices, architectures, "2.27.7")))

    v100 = {"name": "V100", "capability": [7, 0], "memory": 32 * GIB, "problem": ""}
    assert "torch has no kernels for V100" in only(of(v100), "error")[0]
    assert "no bfloat16" in only(of(v100, architectures=["sm_70"]), "warning")[0]
    assert "every step waits for the slowest" in " ".join(only(of(H100, {**H100, "name": "A100"}), "warning"))
    assert "wrong product" in only(of({**H100, "problem": "wrong product in bfloat16"}), "error")[0]


@pytest.mark.parametrize(
    ("capability", "architectures", "has"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),
        ((7, 5), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_90", "sm_90a"], False),
        ((7, 0), ["sm_80", "compute_80"], False),
        ((10, 0), ["sm_100"], True),
    ],
)
def test_kernels_for_a_gpu(capability: tuple[int, int], architectures: list[str], has: bool) -> None:
    assert gpus.has_kernels(capability, architectures) is has


def test_the_topology_is_read() -> None:
    found = links.ways_between(TOPOLOGY)
    assert found == {"NV": ["GPU0–GPU1"], "SYS": ["GPU0–GPU2"], "NODE": ["GPU1–GPU2"]}
    assert links.ways_between("Topology not supported") == {}


@pytest.mark.parametrize(
    ("topology", "severity", "says"),
    [
        (TOPOLOGY, "warning", "GPU0–GPU2 through the link between sockets (SYS)"),
        (TOPOLOGY.replace("SYS", "NV18").replace("NODE", "NV18"), "passed", "NVLink between all 3"),
        (TOPOLOGY.replace("SYS", "PIX").replace("NODE", "PIX"), "passed", "one PCIe switch"),
        ("", "skipped", "does not say"),
    ],
)
def test_ways_between_gpus(topology: str, severity: str, says: str) -> None:
    (finding,) = links.check_topology(LinkFacts(topology=topology), 3)
    assert finding.severity == severity
    assert says in finding.found


def test_ports_are_read_as_linux_shows_them(tmp_path: Path) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    for name, text in (("state", "4: ACTIVE\n"), ("rate", "400 Gb/sec (4X NDR)\n"), ("link_layer", "InfiniBand\n")):
        (port / name).write_text(text)
    assert links.read_ports(tmp_path) == [Port("mlx5_0:1", True, "400 Gb/sec (4X NDR)", "InfiniBand")]
    (port / "state").write_text("1: DOWN\n")
    assert not links.read_ports(tmp_path)[0].active
    assert links.read_ports(tmp_path / "nothing") == []


UP = Port("mlx5_0:1", True, "400 Gb/sec", "InfiniBand")


@pytest.mark.parametrize(
    ("facts", "severity", "says"),
    [
        (LinkFacts(), "skipped", "TCP"),
        (LinkFacts(ports=[UP]), "passed", "400 Gb/sec"),
        (LinkFacts(ports=[replace(UP, active=False)]), "warning", "no port is up (mlx5_0:1)"),
        (LinkFacts(ports=[UP], locked_memory=8 << 20), "warning", "at most 8192 KiB may be locked"),
        (LinkFacts(ports=[UP], settings={"NCCL_IB_DISABLE": "1"}), "warning", "NCCL_IB_DISABLE"),
    ],
)
def test_infiniband(facts: LinkFacts, severity: str, says: str) -> None:
    assert says in only(links.check_fabric(facts), severity)[0]


@pytest.mark.parametrize(
    ("settings", "severity", "says"),
    [
        ({}, "passed", "defaults"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, "passed", "NCCL_SOCKET_IFNAME=eth"),
        ({"NCCL_SOCKET_IFNAME": "ib0"}, "error", "no such network interface; there are lo, eth0"),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "error", "GLOO_SOCKET_IFNAME=eth"),
        ({"NCCL_P2P_DISABLE": "1"}, "warning", "NVLink"),
        ({"NCCL_DEBUG": "info"}, "warning", "NCCL_DEBUG=info"),
    ],
)
def test_variables_of_nccl_and_gloo(settings: dict[str, str], severity: str, says: str) -> None:
    (finding,) = links.check_settings(LinkFacts(interfaces=["lo", "eth0"], settings=settings))
    assert finding.severity == severity
    assert says in finding.line


@pytest.mark.parametrize(
    ("wanted", "exact", "named"),
    [
        ("eth", False, True),
        ("=eth", False, False),
        ("=eth0", False, True),
        ("^lo", False, True),
        ("^lo,eth", False, False),
    ],
)
def test_names_of_interfaces_as_nccl_takes_them(wanted: str, exact: bool, named: bool) -> None:
    assert links.names_interface(wanted, ["lo", "eth0"], exact) is named


@pytest.mark.parametrize(
    ("size", "free", "gpus_here", "severity", "says"),
    [
        (GIB, GIB, 8, "passed", "1.0 GiB"),
        (64 << 20, 64 << 20, 0, "warning", "64 MiB, Docker's default"),
        (64 << 20, 64 << 20, 8, "error", "--shm-size"),
        (0, 0, 1, "warning", "there is no /dev/shm"),
        (8 * GIB, 1 << 20, 1, "warning", "1 MiB are free of 8.0 GiB"),
    ],
)
def test_shared_memory(size: int, free: int, gpus_here: int, severity: str, says: str) -> None:
    (finding,) = links.check_limits(LinkFacts(shared_memory=size, shared_memory_free=free), gpus_here, 65536)
    assert finding.severity == severity
    assert says in finding.line


def test_open_files() -> None:
    (finding,) = links.check_limits(LinkFacts(shared_memory=GIB, shared_memory_free=GIB), 1, open_files=256)
    assert (finding.severity, "ulimit -n" in finding.remedy) == ("warning", True)
