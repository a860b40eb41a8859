"""The house: rooms import only leftwards, heavy libraries have one owner, importing the package is instant."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "llara_dist"
FOUNDATION = {"errors", "hashing", "integrity", "console", "commands"}
ORDER = [
    "config",
    "run_options",
    "ds_config",
    "distributed",
    "supervision",
    "data",
    "recommenders",
    "stream",
    "model",
    "cost",
    "training",
    "evaluation",
    "tuning",
    "replay",
    "autotune",
    "watching",
    "cluster",
    "doctor",
    "quickstart",
    "cli",
]
OWNERS = {
    "polars": {"data"},
    "pyarrow": {"data", "stream"},
    "webdataset": {"data", "stream"},
    "peft": {"model"},
    "bitsandbytes": {"model", "doctor"},
    "triton": {"model"},
    "deepspeed": {"training", "distributed", "doctor"},
    "fsspec": {"stream"},
    "aiohttp": {"stream"},
}


def imports(path: Path) -> set[str]:
    """Absolute module names that a file imports anywhere, type-checking blocks included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_leftwards(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    reachable = FOUNDATION | (set(ORDER[: ORDER.index(here) + 1]) if here in ORDER else FOUNDATION)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "llara_dist" and len(parts) > 1 and parts[1] not in ("__version__",):
            assert parts[1] in reachable, f"{here} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_have_one_owner(path: Path) -> None:
    for name in imports(path):
        owners = OWNERS.get(name.split(".")[0])
        assert owners is None or room(path) in owners, f"{path} imports {name}"


def test_importing_the_package_pulls_in_nothing_heavy() -> None:
    code = (
        "import sys, llara_dist, llara_dist.cli; "
        "heavy = {'torch','numpy','polars','pyarrow','transformers','deepspeed','peft','jsonargparse','rich'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_no_unsafe_loading() -> None:
    for path in FILES:
        text = path.read_text()
        assert "torch.load(" not in text or "weights_only=True" in text, path
        assert "pickle.load" not in text, path
        assert not re.search(r"load_state_dict\([^)]*strict=False", text), path
