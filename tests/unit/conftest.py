"""Fixtures that the tests of several rooms share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import FaultyServer


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """A shards folder to be damaged: a copy of the one in the module's `root`."""
    shutil.copytree(root / "shards", tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """An http server on loopback without files or faults yet."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = FaultyServer()
    yield running
    running.close()


@pytest.fixture
def no_cpp_compiler() -> Iterator[None]:
    """torch.compile's own search finds none."""
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        yield
