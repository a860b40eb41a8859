"""Addresses and transfers: what is a URL, what may be said of it, what is tried again and what is final."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
import traceback

import pytest

from llara_dist.errors import InputError
from llara_dist.stream import remote as room
from llara_dist.stream.remote import RemoteFolder, Retry, Timeouts, TransferError, is_url, redact
from tests.servers import FaultyServer, content, s3_bucket

SECRET = "hunter2SECRET"
QUICK = Retry(attempts=3, backoff_seconds=0.001)


def everything_said(error: BaseException) -> str:
    """All that a traceback, a repr or a tool that walks the chain could show."""
    said = []
    current: BaseException | None = error
    while current is not None:
        said += [str(current), repr(current), repr(vars(current))]
        current = current.__cause__ or current.__context__
    return "\n".join(said + traceback.format_exception(error))


def test_what_is_a_url() -> None:
    for url in ("s3://b/k", "https://h/p", "memory://x", "file:///tmp/x", "GS://b"):
        assert is_url(url)
    for path in ("shards/out", "/data/s3", "./x", "C:\\data", "a:b", "", "//host/share", "://x"):
        assert not is_url(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://h/p/a.tar", "https://h/p/a.tar"),
        ("https://h:8080/p@1/a.tar", "https://h:8080/p@1/a.tar"),
        ("http://[::1]:80/a", "http://[::1]:80/a"),
        (f"https://me:{SECRET}@h/p", "https://h/p"),
        (f"https://me:pa/{SECRET}@h/p", "https://h/p"),
        (f"s3://key:{SECRET}@bucket/a", "s3://bucket/a"),
        (f"https://h/p?token={SECRET}", "https://h/p"),
        (f"https://h/p?a='{SECRET}'&b=({SECRET})", "https://h/p"),
        (f"https://h/it's?a={SECRET}", "https://h/it's"),
        (f"https://h/p#{SECRET} and http://u:{SECRET}@i/?x={SECRET} end", "https://h/p and http://i/ end"),
        (f"403, message='no', url='http://h/p?X-Amz-Signature={SECRET}'", "403, message='no', url='http://h/p"),
        (f'<Url>https://h/p?x={SECRET}</Url> "https://u:{SECRET}@h/p"', '<Url>https://h/p</Url> "https://h/p"'),
    ],
)
def test_redact(text: str, told: str) -> None:
    assert redact(text) == told


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"https://me:{SECRET}@h/p", "credentials belong in the environment"),
        (f"https://{SECRET}@h/p", "credentials belong in the environment"),
        (f"https://h/p?token={SECRET}", "credentials belong in the environment"),
        (f"https://h/p#{SECRET}", "credentials belong in the environment"),
        (f"s3://key:{SECRET}@bucket/p", "credentials belong in the environment"),
        ("gopher://h/p", r"unknown scheme gopher://; use a path, http\(s\)://, s3:// or gs://"),
        ("shards/out", "must be a URL with a scheme"),
        ("https:///p", "not a valid URL"),
        ("https://h:notaport/p", "credentials belong|not a valid URL"),
        ("http://[::1/p", "not a valid URL"),
    ],
)
def test_addresses_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        RemoteFolder.open(url)
    assert SECRET not in everything_said(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec  # noqa: F401  its attribute `registry` is not the module of that name

    loaded = sys.modules["fsspec.registry"]._registry
    for scheme, module, extra in (("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")):
        monkeypatch.delitem(loaded, scheme, raising=False)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=rf"pip install 'llara_dist\[{extra}\]'"):
            RemoteFolder.open(f"{scheme}://bucket/shards")


def test_folders_and_names(server: FaultyServer) -> None:
    folder = RemoteFolder.open(server.url + "/a//").folder("b c")
    assert folder.shown("x.tar") == f"{server.url}/a/b c/x.tar"
    server.files["a/b%20c/100%25.json"] = b"{}"
    assert folder.read("100%.json") == b"{}"
    assert pickle.loads(pickle.dumps(folder)) == folder
    assert RemoteFolder.open("MEMORY://x/").url == "memory://x"


def test_other_filesystems(tmp_path: object) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/shards/train/a.tar", b"abc" * 1000)
    folder = RemoteFolder.open("memory://shards").folder("train")
    assert folder.read("a.tar") == b"abc" * 1000
    with pytest.raises(InputError, match=r"memory://shards/train/b\.tar: not found; check the address"):
        folder.read("b.tar")
    with open(f"{tmp_path}/a", "wb") as file:
        file.write(b"local")
    assert RemoteFolder.open(f"file://{tmp_path}").read("a") == b"local"


def test_one_plain_get(server: FaultyServer) -> None:
    server.put("a", 3_000_000)
    folder = RemoteFolder.open(server.url)
    chunks = list(folder.stream("a"))
    assert b"".join(chunks) == server.files["a"]
    assert len(chunks) > 1
    assert server.asked["a"] == 1
    assert server.methods == {("GET", False)}  # no HEAD, no Range: any server can answer
    assert server.headers["a"]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("faults", "asked"),
    [
        ([("status", 503), ("status", 503)], 3),
        ([("status", 429)], 2),
        ([("cut", 1000)], 2),
        ([("stall", 1000)], 2),
        ([("slow", 0.01)], 1),
    ],
)
def test_small_files_are_tried_again(server: FaultyServer, faults: list, asked: int) -> None:
    server.put("manifest.json", 100_000)
    server.faults["manifest.json"] = faults
    folder = RemoteFolder.open(server.url, Timeouts(30, 2 if faults[0][0] == "stall" else 30))
    assert folder.read("manifest.json", QUICK) == server.files["manifest.json"]
    assert server.asked["manifest.json"] == asked


@pytest.mark.parametrize(
    ("fault", "asked", "message"),
    [
        (("status", 404), 1, r"a: not found \(the server answers 404\); check the address"),
        (("status", 401), 1, r"a: access refused \(the server answers 401\); check .* credentials"),
        (("status", 403), 1, r"a: access refused \(the server answers 403\); check .* credentials"),
        (("status", 400), 1, r"a: the server answers 400"),
        (("status", 500), 3, r"a: the server answers 500 \(3 attempts\); check the server"),
        (("redirect", "/a"), 10, r"a: the server redirects in a circle; check the address"),
        (("stall", 10), 3, r"a: timed out .*\(3 attempts\)"),
        (("cut", 10), 3, r"a: the connection was cut \(3 attempts\)"),
    ],
)
def test_what_is_final_and_what_is_not(server: FaultyServer, fault: tuple, asked: int, message: str) -> None:
    server.put("a", 1000)
    server.always["a"] = fault
    folder = RemoteFolder.open(server.url, Timeouts(30, 0.2 if fault[0] == "stall" else 30))
    with pytest.raises(InputError, match=message) as caught:
        folder.read("a", QUICK)
    assert server.asked["a"] == asked
    assert "\n" not in str(caught.value)
    assert not caught.value.everywhere


def test_nobody_there(server: FaultyServer) -> None:
    server.close()
    with pytest.raises(InputError, match=r"ClientConnectorError: .*\(2 attempts\)"):
        RemoteFolder.open(server.url).read("a", Retry(2, 0.001))


def test_pauses_grow_and_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float]] = []
    monkeypatch.setattr(room.random, "uniform", lambda low, high: asked.append((low, high)) or high)
    slept: list[float] = []

    def fail() -> None:
        raise TransferError("no")

    with pytest.raises(InputError, match="9 attempts"):
        Retry(9, 0.5).run(fail, "x", slept.append)
    assert slept == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert all(low == 0 for low, _ in asked)


def test_redirects_and_headers_tell_no_credentials(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The Authorization header reaches the server; what a presigned address says reaches nobody."""
    import fsspec.config

    caplog.set_level(logging.DEBUG)
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"Authorization": f"Bearer {SECRET}"}})
    room._connect.cache_clear()
    try:
        folder, impatient = (RemoteFolder.open(server.url, Timeouts(30, seconds)) for seconds in (30, 0.3))
        server.put("good", 1000)
        assert folder.read("good", QUICK) == server.files["good"]
        assert server.headers["good"]["Authorization"] == f"Bearer {SECRET}"
        target = f"{server.url}/there?X-Amz-Signature={SECRET}"
        server.put("there", 1000)
        server.always["a"] = ("redirect", target)
        assert folder.read("a", QUICK) == server.files["there"]
        faults = [("status", 403), ("status", 404), ("status", 500), ("cut", 10), ("stall", 10), ("redirect", target)]
        said = []
        for fault in faults:
            server.always["there"] = fault
            with pytest.raises(InputError) as caught:
                (impatient if fault[0] == "stall" else folder).read("a", QUICK)
            said.append(everything_said(caught.value))
        for broken in (f"http://:80:80/?sig={SECRET}", f"ftp://me:{SECRET}@h/", f"http://127.0.0.1:1/?sig={SECRET}"):
            server.always["a"] = ("redirect", broken)
            with pytest.raises(InputError) as caught:
                folder.read("a", QUICK)
            said.append(everything_said(caught.value))
    finally:
        room._connect.cache_clear()
    assert len(said) == len(faults) + 3
    assert SECRET not in "\n".join(said)
    assert SECRET not in caplog.text
    assert SECRET not in repr(folder)


def test_a_header_from_the_environment(server: FaultyServer) -> None:
    """As a user sets it: FSSPEC_HTTP in the environment of a fresh process."""
    server.put("a", 100)
    code = f"from llara_dist.stream.remote import RemoteFolder; print(len(RemoteFolder.open({server.url!r}).read('a')))"
    environment = {**room.os.environ, "FSSPEC_HTTP": f'{{"headers": {{"Authorization": "Bearer {SECRET}"}}}}'}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "100\n", done.stderr
    assert server.headers["a"]["Authorization"] == f"Bearer {SECRET}"
    assert SECRET not in done.stderr


def test_s3(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    data = content("shard", 40_000_000)  # more than one ranged request
    with s3_bucket(monkeypatch, "bucket", {"set/train/a.tar": data}, SECRET) as url:
        room._connect.cache_clear()
        caplog.set_level(logging.DEBUG)
        folder = RemoteFolder.open(f"{url}/set").folder("train")
        assert folder.read("a.tar") == data
        said = []
        for missing in (folder, RemoteFolder.open("s3://nobody")):
            with pytest.raises(InputError, match=r"s3://.*b\.tar: not found; check the address") as caught:
                missing.read("b.tar", QUICK)
            said.append(everything_said(caught.value))
    with pytest.raises(InputError, match=r"\(2 attempts\)") as caught:  # the server is gone
        folder.read("a.tar", Retry(2, 0.001))
    said.append(everything_said(caught.value))
    room._connect.cache_clear()
    assert SECRET not in "\n".join(said)
    assert SECRET not in caplog.text
