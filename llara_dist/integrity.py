"""What is not complete is not there: staging names, fsync, rename, and content hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llara_dist.errors import InputError


def sha256_bytes(data: bytes | memoryview) -> str:
    """Hex sha256 of a byte string."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, streamed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def fsync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file whole or not at all: staging name beside it, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}.staging")
    try:
        with open(staging, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
    fsync_folder(path.parent)


def json_text(value: Any) -> str:
    """The text of a JSON file as `write_json` writes it: indented, keys in the given order."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, indented, keys in the given order, whole or not at all."""
    write_file(path, json_text(value))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        what: what it is for the reader of the error, e.g. "a dataset folder's dataset.json".

    Raises:
        InputError: the file is missing or is no JSON object.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: not found; expected {what}") from None
    return parse_json(data, str(path), what)


def parse_json(data: bytes, shown: str, what: str) -> dict[str, Any]:
    """A JSON object from bytes; `shown` names where they come from, `what` says what was expected.

    Raises:
        InputError: it is none.
    """
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, an endless number, brackets without end
        raise InputError(f"{shown}: not JSON ({error}); expected {what}") from None
    if not isinstance(value, dict):
        raise InputError(f"{shown}: holds a JSON {type(value).__name__}, expected an object: {what}")
    return value


@contextlib.contextmanager
def staged_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a staging folder that becomes `path` when the block ends well and vanishes when it does not.

    Args:
        path: the final folder.
        replace: whether an existing folder may be replaced.

    Raises:
        InputError: `path` exists and `replace` is false.
    """
    path = Path(path)
    if path.exists() and not replace and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: exists already; remove it or choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        fsync_folder(staging)
        if path.exists():
            retired = path.with_name(f".{path.name}.{os.getpid()}.retired")
            os.replace(path, retired)
            os.replace(staging, path)
            shutil.rmtree(retired)
        else:
            os.replace(staging, path)
        fsync_folder(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
