"""Where files come from: local disks, http(s) servers and object stores through fsspec; what may be said of an address.

A location is a path or a URL. Credentials never stand in a URL: libraries find them in the environment or in their own
configuration. Everything said of a transfer goes through `redact`, since servers answer with addresses that carry a
signature (a redirect to a presigned URL) and libraries repeat them in their errors.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import random
import re
import time
import urllib.parse
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any

from llara_dist.errors import InputError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# A quote may stand unescaped in a URL, so it does not end one: rather a quote lost from a message than a secret told.
_URL = re.compile(r'([A-Za-z][A-Za-z0-9+.-]*://)([^\s"<>?#]*)([?#][^\s"<>]*)?')
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_HTTP = ("http", "https")
_NO_HOST = ("file", "local", "memory")
_RANGE_BYTES = 16 << 20
"""what one request to an object store asks for"""
_HTTP_CHUNK_BYTES = 1 << 20
_LONGEST_PAUSE_SECONDS = 30.0
_NOT_FINAL = (408, 425, 429)
"""client errors (4xx) that another attempt may not meet: request timeout, too early, too many requests"""
_FINAL_ERRNOS = (errno.EINVAL, errno.EPERM, errno.ENOSYS, getattr(errno, "EREMCHG", errno.EINVAL))
"""what object stores' refusals become: invalid names or headers, another region"""


def is_url(location: str) -> bool:
    """Whether a location has a scheme ("s3://…", "https://…", "memory://…", "file://…"); a plain path has none."""
    return _SCHEME.match(location) is not None


def redact(text: str) -> str:
    """`text` with user, password, query and fragment taken out of every URL in it."""
    return _URL.sub(lambda match: match[1] + _without_user(match[2]), text)


def _without_user(rest: str) -> str:
    authority = rest.partition("/")[0]
    port = authority.rpartition(":")[2] if ":" in authority and not authority.endswith("]") else ""
    # "user:pa/ss@host": an unescaped password that holds a slash. What follows the colon is no port then.
    if "@" in authority or (port and not port.isdecimal()):
        return rest.rpartition("@")[2]
    return rest


class TransferError(Exception):
    """One attempt to get a file failed. The message is redacted; the library's error is not chained.

    Args:
        message: what was seen.
        final: whether another attempt would see the same (missing, refused).
    """

    def __init__(self, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


@dataclass(frozen=True)
class Timeouts:
    """How long to wait for a server. There is no limit on a whole transfer: a large shard may come slowly."""

    connect_seconds: float = 30.0
    read_seconds: float = 60.0
    """between two pieces of a body"""


@dataclass(frozen=True)
class Retry:
    """Bounded attempts, with exponential backoff and full jitter between them."""

    attempts: int = 5
    backoff_seconds: float = 0.5
    """upper end of the first pause; doubled for each one after, up to 30 seconds"""

    def run(self, attempt: Callable[[], Any], shown: str, sleep: Callable[[float], Any] = time.sleep) -> Any:
        """What the first good `attempt` returns.

        Args:
            attempt: raises `TransferError` when it fails.
            shown: the file's redacted address.
            sleep: waits that many seconds, or raises to give up.

        Raises:
            InputError: all attempts failed, or one failed in a way that is final.
        """
        for number in range(1, self.attempts + 1):
            try:
                return attempt()
            except TransferError as error:
                problem, final = str(error), error.final
            if final:
                raise InputError(
                    f"{shown}: {problem}; check the address, and the credentials in the environment or in fsspec's "
                    "configuration",
                    everywhere=False,
                )
            if number < self.attempts:
                longest = min(self.backoff_seconds * 2 ** (number - 1), _LONGEST_PAUSE_SECONDS)
                sleep(random.uniform(0, longest))
        raise InputError(
            f"{shown}: {problem} ({self.attempts} attempts); check the server and the network, then run again",
            everywhere=False,
        )


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL; small and picklable, since the connection is made in the process that reads."""

    url: str
    """without user, password, query and trailing slash"""
    timeouts: Timeouts = field(default_factory=Timeouts)

    @classmethod
    def open(cls, url: str, timeouts: Timeouts | None = None) -> RemoteFolder:
        """Check a URL and that its scheme's library is here; nothing is connected yet.

        Raises:
            InputError: no URL, credentials in the URL, an unknown scheme, or a scheme whose library is missing.
        """
        shown = redact(url)
        if not is_url(url):
            raise InputError(f"{shown}: must be a URL with a scheme, as in s3://bucket/shards")
        scheme = url.partition("://")[0].lower()
        try:
            parts = urllib.parse.urlsplit(url)
            host, _ = parts.netloc, parts.port
        except ValueError:
            host = None
        if shown != url or (host and "@" in host):
            raise InputError(
                f"{shown}: the URL carries a user, a password, a query or a fragment; credentials belong in the "
                "environment (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, FSSPEC_HTTPS) or in fsspec's configuration"
            )
        if host is None or (not host and scheme not in _NO_HOST):
            raise InputError(f"{shown}: not a valid URL; give it as scheme://host/folder")
        _filesystem_class(scheme, shown)
        rest = url.partition("://")[2]
        return cls(f"{scheme}://{rest.rstrip('/')}", timeouts or Timeouts())

    def folder(self, name: str) -> RemoteFolder:
        """A folder inside this one."""
        return replace(self, url=f"{self.url}/{name}")

    def shown(self, name: str) -> str:
        """The address of a file, for messages."""
        return redact(f"{self.url}/{name}")

    def read(self, name: str, retry: Retry | None = None) -> bytes:
        """A small file whole.

        Raises:
            InputError: missing, refused, or not to be had in a bounded number of attempts.
        """
        return (retry or Retry()).run(lambda: b"".join(self.stream(name)), self.shown(name))

    def stream(self, name: str) -> Generator[bytes, None, None]:
        """A file's bytes in chunks, in one attempt.

        Raises:
            TransferError: the attempt failed, at the start or on the way.
        """
        failure = None
        try:
            if self.url.startswith(("http://", "https://")):
                yield from self._http_chunks(name)
            else:
                yield from self._ranged_chunks(name)
        except TransferError:
            raise
        except Exception as error:  # each library has its own classes; all of them end here, redacted
            failure = _explain(error)
        # Raised out here, so that the library's error, which may hold headers, is not even this one's context.
        if failure:
            raise failure

    def _http_chunks(self, name: str) -> Generator[bytes, None, None]:
        # One plain GET, which any server answers: fsspec's own files would ask for the size first and then for ranges.
        filesystem = self._filesystem()
        url = filesystem.encode_url(f"{self.url}/{urllib.parse.quote(name)}")

        def submit(work: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(work, filesystem.loop)

        async def connect() -> Any:
            return await (await filesystem.set_session()).get(url, **filesystem.kwargs)

        async def read() -> bytes:
            pieces, size = [], 0
            try:
                while size < _HTTP_CHUNK_BYTES and (piece := await response.content.read(_HTTP_CHUNK_BYTES - size)):
                    pieces.append(piece)
                    size += len(piece)
            except Exception:  # what came before counts as received; the stream raises again at the next read
                if not pieces:
                    raise
            return b"".join(pieces)

        async def close() -> None:
            response.close()

        response = submit(connect()).result()
        pending = None
        try:
            if response.status != 200:
                raise _bad_status(response.status)
            pending = submit(read())
            while chunk := pending.result():
                pending = submit(read())  # the next piece arrives while this one is hashed and written
                yield chunk
        finally:
            if pending is not None:
                pending.cancel()
            submit(close())

    def _ranged_chunks(self, name: str) -> Generator[bytes, None, None]:
        filesystem = self._filesystem()
        with filesystem.open(f"{self.url}/{name}", "rb", block_size=_RANGE_BYTES, cache_type="none") as file:
            while chunk := file.read(_RANGE_BYTES):
                yield chunk

    def _filesystem(self) -> Any:
        # By process: the event loop of a parent does not run in a forked child.
        return _connect(self.url.partition("://")[0], self.timeouts, os.getpid())


@functools.lru_cache(maxsize=16)
def _connect(scheme: str, timeouts: Timeouts, process: int) -> Any:
    """One fsspec filesystem a scheme and process, shared by its threads."""
    import fsspec.asyn
    import fsspec.config

    known = _filesystem_class(scheme, f"{scheme}://")
    given = fsspec.config.apply_config(known, {})
    filesystem = known(**{**given, **_settings(scheme, timeouts, given)}, skip_instance_cache=True)
    if getattr(filesystem, "async_impl", False) and hasattr(filesystem, "set_session"):
        fsspec.asyn.sync(filesystem.loop, filesystem.set_session)  # here, so that threads do not make one each
    if scheme in ("s3", "s3a"):
        filesystem.retries = 1  # attempts are counted in one place, `Retry`
    return filesystem


def _settings(scheme: str, timeouts: Timeouts, given: dict[str, Any]) -> dict[str, Any]:
    """What we set beside the user's own fsspec configuration, which wins."""
    if scheme in _HTTP:
        import aiohttp

        limits = aiohttp.ClientTimeout(
            total=None, sock_connect=timeouts.connect_seconds, sock_read=timeouts.read_seconds
        )
        return {
            "headers": {"Accept-Encoding": "identity", **given.get("headers", {})},
            "client_kwargs": {"timeout": limits, "trust_env": True, **given.get("client_kwargs", {})},
        }
    if scheme in ("s3", "s3a"):
        limits = {"connect_timeout": timeouts.connect_seconds, "read_timeout": timeouts.read_seconds}
        attempts = {"retries": {"total_max_attempts": 1}}
        return {"config_kwargs": {**limits, **attempts, **given.get("config_kwargs", {})}}
    return {}


def _filesystem_class(scheme: str, shown: str) -> Any:
    import fsspec

    problem = None
    try:
        return fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        remedy = f"pip install 'llara_dist[{extra}]'" if extra else f"install it ({error})"
        problem = f"{shown}: the library for {scheme}:// is missing; {remedy}"
    except ValueError:
        problem = f"{shown}: unknown scheme {scheme}://; use a path, http(s)://, s3:// or gs://"
    raise InputError(problem)


def _bad_status(status: int) -> TransferError:
    if status in (401, 403):
        return TransferError(f"access refused (the server answers {status})", final=True)
    if status in (404, 410):
        return TransferError(f"not found (the server answers {status})", final=True)
    final = status < 500 and status not in _NOT_FINAL
    return TransferError(f"the server answers {status}", final)


def _explain(error: Exception) -> TransferError:
    """A library's error in words that hold no credentials."""
    # aiohttp says status, gcsfs says code.
    status = getattr(error, "status" if hasattr(error, "status") else "code", None)
    if isinstance(status, int) and 300 <= status < 600:
        return _bad_status(status)
    if isinstance(error, FileNotFoundError):
        return TransferError("not found", final=True)
    if isinstance(error, PermissionError):
        return TransferError("access refused", final=True)
    name = type(error).__name__
    if isinstance(error, TimeoutError):
        return TransferError(f"timed out ({name})")
    if name in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"):
        return TransferError(f"no credentials found ({name})", final=True)
    if "Url" in name or "URL" in name:  # a broken redirect: such an error's text is the address itself
        return TransferError(f"the address or the redirect is broken ({name})", final=True)
    if name == "ClientPayloadError":
        return TransferError("the connection was cut")
    if name == "TooManyRedirects":
        return TransferError("the server redirects in a circle", final=True)
    text = redact(" ".join(str(error).split()))
    final = type(error) is OSError and error.errno in _FINAL_ERRNOS
    return TransferError(f"{name}: {text}" if text else name, final)
