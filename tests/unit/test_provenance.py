"""What a checkpoint says of the code and the machines that made it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from llara_dist import __version__
from llara_dist.training.checkpoints.provenance import code_version, hosts


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *settings, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with one commit."""
    folder = tmp_path / "checkout"
    (folder / "llara_dist").mkdir(parents=True)
    (folder / "llara_dist" / "code.py").write_text("one")
    git(folder, "init", "-q")
    git(folder, "add", "llara_dist/code.py")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_a_clean_checkout_is_named_by_its_commit(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert code_version(checkout) == {"version": __version__, "commit": commit, "dirty": False}


@pytest.mark.parametrize(
    ("file", "dirty"), [("llara_dist/code.py", True), ("llara_dist/new.py", True), ("runs/metrics.jsonl", False)]
)
def test_only_changed_code_makes_it_dirty(checkout: Path, file: str, dirty: bool) -> None:
    (checkout / file).parent.mkdir(exist_ok=True)
    (checkout / file).write_text("two")
    assert code_version(checkout)["dirty"] is dirty


def test_without_a_checkout_of_our_own_there_is_the_version_alone(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code_version(checkout / "llara_dist") == {"version": __version__}  # inside somebody else's
    assert code_version(tmp_path) == {"version": __version__}
    monkeypatch.setenv("PATH", "")
    assert code_version(checkout) == {"version": __version__}


def test_hosts_count_their_ranks_and_name_each_kind_of_device_once() -> None:
    places = [("a", "H100"), ("a", "H100"), ("b", "A100"), ("a", "H200")]
    assert hosts(places) == {
        "a": {"ranks": 3, "devices": ["H100", "H200"]},
        "b": {"ranks": 1, "devices": ["A100"]},
    }
