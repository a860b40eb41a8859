"""Memory, disk and open files: what the machine has against what a run needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from llara_dist.console import GIB
from llara_dist.training.preflight.resources import (
    check_bf16,
    check_disk,
    check_memory,
    check_open_files,
    cpu_has_bf16,
    free_host_bytes,
    nearest_existing,
)


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    """A machine with 8 GiB available."""
    path = tmp_path / "meminfo"
    path.write_text(f"MemTotal: {16 << 20} kB\nMemFree: {1 << 20} kB\nMemAvailable: {8 << 20} kB\n")
    return path


def limit(folder: Path, most: str, used: int = 0, cached: int = 0) -> Path:
    """A control group's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    return folder


def test_free_memory_is_what_linux_says(meminfo: Path, tmp_path: Path) -> None:
    assert free_host_bytes(meminfo, limit(tmp_path / "group", "max")) == 8 * GIB
    assert free_host_bytes() > 0


def test_a_limit_on_this_group_or_one_above_counts(meminfo: Path, tmp_path: Path) -> None:
    limit(tmp_path / "job", str(6 * GIB), used=4 * GIB, cached=3 * GIB)
    assert free_host_bytes(meminfo, limit(tmp_path / "job" / "step", "max")) == 5 * GIB
    limit(tmp_path / "job" / "step", str(2 * GIB), used=GIB)
    assert free_host_bytes(meminfo, tmp_path / "job" / "step") == GIB


@pytest.mark.parametrize(
    ("need", "device_free", "host_free", "expected"),
    [
        ((8 * GIB, 0), None, 40 * GIB, []),
        ((8 * GIB, 0), None, 33 * GIB, ["warning"]),
        ((8 * GIB, 0), None, 20 * GIB, ["error"]),
        ((30 * GIB, 4 * GIB), 79 * GIB, 100 * GIB, []),
        ((75 * GIB, 4 * GIB), 79 * GIB, 100 * GIB, ["warning"]),
        ((130 * GIB, 4 * GIB), 79 * GIB, 100 * GIB, ["error"]),
        ((130 * GIB, 40 * GIB), 79 * GIB, 100 * GIB, ["error", "error"]),
    ],
)
def test_four_ranks_against_the_memory_of_gpu_and_node(
    need: tuple[int, int], device_free: int | None, host_free: int, expected: list[str]
) -> None:
    findings = check_memory(*need, device_free, host_free, 4, "rank 3 on node-b")
    assert [finding.severity for finding in findings] == expected
    assert all(finding.found.startswith("rank 3 on node-b: ") for finding in findings)
    # Each rank has a GPU of its own, the node's memory is every rank's.
    assert [finding.everywhere for finding in findings] == [device_free is None, True][: len(findings)]


def test_disk_that_is_too_small_is_found_without_writing(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "one"
    assert check_disk(out, GIB, free=GIB) == []
    (finding,) = check_disk(out, GIB + 1, free=GIB)
    assert "checkpoints need 1.00 GiB, 1.00 GiB are free" in finding.found
    (finding,) = check_disk(out, 1 << 62)
    assert finding.severity == "error"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (finding,) = check_disk(tmp_path / "file" / "run", 0)
    assert "file is no folder" in finding.found
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    (finding,) = check_disk(tmp_path / "run", 0)
    assert "cannot be written by this user" in finding.found


def test_nearest_existing_folder(tmp_path: Path) -> None:
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path
    assert nearest_existing(tmp_path) == tmp_path


def test_open_files() -> None:
    assert check_open_files(1, limit=1024) == []
    (finding,) = check_open_files(3, limit=1023)
    assert finding.severity == "warning"
    assert "ulimit -n 1024" in finding.remedy


@pytest.mark.parametrize(("flags", "has"), [("fpu avx512_bf16 ssse3", True), ("fpu avx512f", False)])
def test_bfloat16_on_a_processor_without_it(tmp_path: Path, flags: str, has: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    assert cpu_has_bf16(tmp_path / "cpuinfo") == has
    assert len(check_bf16(True, has)) == (not has)
    assert check_bf16(False, has) == []
