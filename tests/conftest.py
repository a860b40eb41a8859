"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A slow machine is no failure. Where a change is delivered every example is the same each time: new ones are searched
# for by who develops.
settings.register_profile("no deadline", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("no deadline")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test asks a model hub, whose client tries again for 20 s where there is no network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure() -> None:
    """Where there is a GPU, each run decides itself what DeepSpeed computes on."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real inputs and expected outputs; it lies beside the checkout or at $LLARA_DIST_SHARED."""
    path = Path(os.environ.get("LLARA_DIST_SHARED", Path(__file__).parents[2] / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"no real inputs at {path}; set LLARA_DIST_SHARED to run this test")
    return path


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama (vocabulary 400, hidden 64)."""
    from tests.tiny import write_llama

    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder)
    return folder


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, llm/, rec/ and shards/ of a small synthetic world, made by the real commands."""
    from tests.runs import make_inputs

    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder
