"""`llara-dist download`: fetch a public data set from its publisher; nothing is shipped, everything is checked."""

from __future__ import annotations

import hashlib
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llara_dist.console import progress, say
from llara_dist.errors import InputError
from llara_dist.integrity import sha256_bytes, sha256_file, staged_folder

_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Publication:
    """Where a data set is published and what it must be."""

    url: str
    folder: str
    """Name of the folder made, and of the archive's top folder."""
    md5: str
    """Of the archive, as its publisher states it."""
    files: dict[str, str | None]
    """Members that are taken, with the sha256 that each must have where it is pinned."""
    max_bytes: int
    """No more than this is fetched or unpacked, so that a wrong address cannot fill the disk."""
    terms: str


PUBLICATIONS = {
    "movielens": Publication(
        url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        folder="ml-100k",
        md5="0e33842e24a9c977be4e0107933c0723",
        files={
            "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
            "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
            "README": None,
        },
        max_bytes=64 << 20,
        terms="MovieLens is GroupLens' data set; its README states the terms of use (research, no redistribution).",
    )
}


def download(dataset: Literal["movielens"], out: Path, url: str | None = None) -> dict[str, Any]:
    """Fetch a data set from its publisher, check it against pinned checksums and unpack what is needed.

    A transfer that was cut is resumed, within the call and by the next call.

    Args:
        dataset: which one.
        out: the folder to put it in, as a folder of its own name (`ml-100k`).
        url: another address of the same archive (a mirror); the checksums stay.

    Returns:
        folder (ready for `prepare --raw`), files, bytes fetched by this call (0 when all was there already).

    Raises:
        InputError: unknown data set, the address cannot be reached, or what came is not what was published.
    """
    if dataset not in PUBLICATIONS:
        raise InputError(f"download {dataset!r}: must be one of {', '.join(PUBLICATIONS)}")
    return download_publication(PUBLICATIONS[dataset], Path(out), url)


def download_publication(publication: Publication, out: Path, url: str | None = None) -> dict[str, Any]:
    """`download` of any publication."""
    folder = out / publication.folder
    pinned = {name: digest for name, digest in publication.files.items() if digest is not None}
    result = {"folder": str(folder), "files": list(publication.files), "bytes": 0}
    if folder.exists():
        for name, digest in pinned.items():
            if not (folder / name).is_file() or sha256_file(folder / name) != digest:
                raise InputError(f"{folder / name}: missing or not as published; remove {folder} and run again")
        say(f"{folder} is there already and as published")
        return result
    out.mkdir(parents=True, exist_ok=True)
    archive = out / f".{publication.folder}.zip.part"
    result["bytes"] = fetch(url or publication.url, archive, publication.md5, publication.max_bytes)
    with staged_folder(folder) as staging:
        _unpack(archive, publication, staging)
    archive.unlink()
    say(f"wrote {folder}")
    say(publication.terms)
    return result


def fetch(url: str, part: Path, md5: str, max_bytes: int, attempts: int = 5, pause_seconds: float = 1.0) -> int:
    """Fetch a file into `part`, which may hold its beginning already; return with its md5 right, or raise.

    Args:
        url: http or https.
        part: the staging file; kept when the transfer breaks, removed when the checksum is wrong.
        md5: hex digest the whole file must have.
        max_bytes: give up beyond this size.
        attempts: how often in a row a transfer may break without a byte of progress.
        pause_seconds: wait before the second attempt, doubled before each one after.

    Returns:
        Bytes fetched by this call.

    Raises:
        InputError: the address is wrong or cannot be reached, or the file is not the published one.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise InputError(f"{url}: must be an http or https address")
    fetched, failures, restarted = 0, 0, False
    while True:
        resumed_at = part.stat().st_size if part.exists() else 0
        problem = None
        try:
            complete = _transfer(url, part, resumed_at, max_bytes)
        except urllib.error.HTTPError as error:
            raise InputError(f"{url}: the server answers {error.code} {error.reason}; check the address") from None
        except InputError:
            part.unlink(missing_ok=True)
            raise
        except (OSError, http.client.HTTPException) as error:
            complete, problem = False, f"{type(error).__name__}: {error}"
        size = part.stat().st_size if part.exists() else 0
        fetched += max(size - resumed_at, 0)
        if not complete:
            failures = 0 if size > resumed_at else failures + 1
            if failures >= attempts:
                kept = f"; {size} bytes are kept in {part}, run again to resume" if size else ""
                raise InputError(
                    f"{url}: the transfer broke {failures} times ({problem or 'connection closed early'}){kept}"
                )
            time.sleep(pause_seconds * 2**failures if failures else 0)
            continue
        found = _md5(part)
        if found == md5:
            return fetched
        part.unlink()
        # A beginning left by an earlier call may be of another file: one fresh start before giving up.
        if resumed_at and not restarted:
            restarted = True
            continue
        raise InputError(f"{url}: md5 is {found}, published is {md5}; what came is not the published file, removed")


def _transfer(url: str, part: Path, start: int, max_bytes: int) -> bool:
    """One request from byte `start` on, appended to `part`; whether the server's end of the file was reached."""
    headers = {"User-Agent": "llara-dist", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing after `start`: the whole file is here, or it is another one
            return True
        if error.code >= 500 or error.code == 429:
            raise ConnectionError(f"the server answers {error.code} {error.reason}") from None
        raise
    with response:
        resumes = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        length = response.headers.get("Content-Length")
        offset = start if resumes else 0
        expected = offset + int(length) if length is not None and length.isdecimal() else None
        if expected is not None and expected > max_bytes:
            raise InputError(f"{url}: {expected} bytes, more than the {max_bytes} this data set can have")
        written = offset
        with open(part, "ab" if resumes else "wb") as file:
            chunks = -(-(expected - offset) // _CHUNK_BYTES) if expected is not None else None
            for chunk in progress(_chunks(response), part.name.removeprefix(".").removesuffix(".part"), chunks):
                file.write(chunk)
                written += len(chunk)
                if written > max_bytes:
                    raise InputError(f"{url}: more than the {max_bytes} bytes this data set can have")
    return expected is None or written == expected


def _chunks(response: Any) -> Iterator[bytes]:
    while chunk := response.read(_CHUNK_BYTES):
        yield chunk


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _unpack(archive: Path, publication: Publication, folder: Path) -> None:
    """Write the wanted members under their own plain names; no name inside the archive decides where."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for name, digest in publication.files.items():
                member = opened.getinfo(f"{publication.folder}/{name}")
                if member.file_size > publication.max_bytes:
                    raise InputError(f"{member.filename} unpacks to {member.file_size} bytes")
                data = opened.read(member)
                if digest is not None and sha256_bytes(data) != digest:
                    raise InputError(f"{member.filename} does not have the pinned sha256")
                (folder / name).write_bytes(data)
    except (InputError, KeyError, zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error) as error:
        archive.unlink()
        raise InputError(f"{archive}: not the published archive, removed ({error.args[0]})") from None
