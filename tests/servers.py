"""Real servers on loopback: an http server that misbehaves on demand, and S3."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from llara_dist.stream.cache import CachedFile
from llara_dist.stream.remote import RemoteFolder, Timeouts

Fault = tuple[str, object]
"""("status", code) | ("cut", bytes) | ("wrong", None) | ("longer", None) | ("short", bytes) | ("stall", bytes) |
("slow", seconds a piece) | ("redirect", address)"""


class FaultyServer:
    """An http server of files in memory; each request for a path meets that path's next fault, then its last if kept.

    Attributes:
        files: path (without the leading slash) → bytes.
        faults: path → what the next requests meet, in order.
        always: path → what every request meets.
        asked: path → GETs so far.
        headers: the last request's headers, by path.
        methods: every method and whether a range was asked for.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.asked: Counter[str] = Counter()
        self.headers: dict[str, dict[str, str]] = {}
        self.methods: set[tuple[str, bool]] = set()
        self.released = threading.Event()
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    owner._answer(self)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.address = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.address}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def put(self, name: str, size: int, remote: RemoteFolder | None = None) -> CachedFile:
        """A file of random bytes that the name decides, and what a manifest would say of it."""
        data = content(name, size)
        self.files[name] = data
        remote = remote or RemoteFolder.open(self.url, Timeouts(connect_seconds=5, read_seconds=5))
        return CachedFile(remote, name, size, hashlib.sha256(data).hexdigest())

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0].lstrip("/")
        with self._lock:
            self.asked[path] += 1
            self.headers[path] = dict(request.headers)
            self.methods.add((request.command, "Range" in request.headers))
            waiting = self.faults[path]
            kind, value = waiting.pop(0) if waiting else self.always.get(path, ("good", None))
        data = self.files.get(path)
        if kind == "redirect":
            request.send_response(302)
            request.send_header("Location", str(value))
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if kind == "status" or data is None:
            body = b"no"
            request.send_response(value if kind == "status" else 404)  # type: ignore[arg-type]
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body)
            return
        if kind == "wrong":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if kind == "longer":
            data += b"more"
        if kind == "short":
            data = data[: int(value)]  # type: ignore[call-overload]
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if kind in ("cut", "stall"):
            request.wfile.write(data[: int(value)])  # type: ignore[call-overload]
            request.wfile.flush()
            if kind == "stall":
                self.released.wait(60)
            request.close_connection = True
            return
        piece = len(data) // 8 + 1 if kind == "slow" else 1 << 18
        for start in range(0, len(data), piece):
            request.wfile.write(data[start : start + piece])
            if kind == "slow":
                time.sleep(float(value))  # type: ignore[arg-type]


def content(name: str, size: int) -> bytes:
    """Random bytes that depend on the name."""
    return np.random.default_rng(list(name.encode())).bytes(size)


@contextlib.contextmanager
def s3_bucket(monkeypatch: pytest.MonkeyPatch, bucket: str, files: dict[str, bytes], secret: str) -> Iterator[str]:
    """A bucket on an S3 server of our own, reached through the environment alone; yields its URL."""
    pytest.importorskip("s3fs", reason="needs the s3 extra")
    server_module = pytest.importorskip("moto.server", reason="needs moto's server")
    import boto3

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket=bucket)
        for name, data in files.items():
            client.put_object(Bucket=bucket, Key=name, Body=data)
        yield f"s3://{bucket}"
    finally:
        server.stop()
