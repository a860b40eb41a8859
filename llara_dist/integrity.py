"""What is not complete is not there: staging names, fsync, rename, and content hashes."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import socket
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
    remove_abandoned(path)
    staging, retired = (
        path.with_name(f".{path.name}.{_machine()}-{os.getpid()}.{kind}") for kind in ("staging", "retired")
    )
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        _fsync_tree(staging)
        if not path.exists():
            os.replace(staging, path)
        elif not _exchange(staging, path):
            # For an instant nothing is at `path`; who is killed there leaves the old folder to `remove_abandoned`.
            os.replace(path, retired)
            os.replace(staging, path)
            shutil.rmtree(retired)
        fsync_folder(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_abandoned(path: Path) -> None:
    """Remove what killed processes of this machine left beside `path` when they were making it.

    Staging folders of living processes and of other machines (on a shared file system) are left alone. A folder that
    was to be replaced when its process was killed gets its name back.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(_machine())}-(\d+)\.(staging|retired)")
    for left in sorted(path.parent.iterdir()):
        match = pattern.fullmatch(left.name)
        if match is None or _is_alive(int(match[1])):
            continue
        if match[2] == "retired" and not path.exists():
            os.replace(left, path)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _machine() -> str:
    """Where a process id means something: the host's name and, on Linux, the process-id namespace (containers)."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return socket.gethostname()
    return f"{socket.gethostname()}.{namespace}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _fsync_tree(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        else:
            fsync_folder(file)
    fsync_folder(folder)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders at once, with Linux's renameat2; False where kernel or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def append_json_line(path: Path, values: dict[str, Any]) -> None:
    """Append one object to a file of JSON lines, durably; a last line that was torn does not swallow it."""
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(values) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> Iterator[Any]:
    """The values of a file of JSON lines, oldest first; lines that a kill or a full disk tore are left out."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            yield json.loads(line)
