"""The downloader against a local server that supports ranges, cuts connections and lies."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llara_dist.data import download as room
from llara_dist.data.download import PUBLICATIONS, Publication, download, download_publication, fetch
from llara_dist.errors import InputError

FILES = {"u.data": b"1\t2\t3\t4\n" * 40_000, "u.item": b"1|Toy Story (1995)\n", "README": b"terms"}


def _archive(files: dict[str, bytes], folder: str = "ml-100k") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:  # stored, so that there is something to cut
        for name, data in files.items():
            opened.writestr(f"{folder}/{name}", data)
    return buffer.getvalue()


class _Server:
    """Serves `data`; `cuts` is how many bytes each of the next answers sends before the connection breaks."""

    def __init__(self, data: bytes) -> None:
        self.data, self.cuts, self.ranges, self.asked, self.status = data, [], True, [], []
        state = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                state.asked.append(wanted)
                if state.status:
                    self.send_error(state.status.pop(0))
                    return
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and state.ranges else 0
                if start and start >= len(state.data):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(state.data) - 1}/{len(state.data)}")
                self.send_header("Content-Length", str(len(state.data) - start))
                self.end_headers()
                body = state.data[start:]
                self.wfile.write(body[: state.cuts.pop(0)] if state.cuts else body)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/ml-100k.zip"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = _Server(_archive(FILES))
    yield running
    running.server.shutdown()
    running.server.server_close()


def _publication(server: _Server, **changes) -> Publication:
    given = Publication(
        url=server.url,
        folder="ml-100k",
        md5=hashlib.md5(server.data).hexdigest(),
        files={name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()} | {"README": None},
        max_bytes=1 << 20,
        terms="terms",
    )
    return replace(given, **changes)


def test_fetches_checks_and_unpacks(server: _Server, tmp_path: Path) -> None:
    result = download_publication(_publication(server), tmp_path / "raw")
    folder = tmp_path / "raw" / "ml-100k"
    assert result == {"folder": str(folder), "files": list(FILES), "bytes": len(server.data)}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["ml-100k"]  # no archive, no staging is left
    again = download_publication(_publication(server), tmp_path / "raw")
    assert again["bytes"] == 0
    assert len(server.asked) == 1
    (folder / "u.item").write_bytes(b"changed")
    with pytest.raises(InputError, match=r"u\.item: missing or not as published"):
        download_publication(_publication(server), tmp_path / "raw")


def test_cut_connection_is_resumed(server: _Server, tmp_path: Path) -> None:
    server.cuts = [100_000, 70_000]
    result = download_publication(_publication(server), tmp_path)
    assert server.asked == [None, "bytes=100000-", "bytes=170000-"]
    assert result["bytes"] == len(server.data)
    assert (tmp_path / "ml-100k" / "u.data").read_bytes() == FILES["u.data"]


def test_the_next_call_resumes(server: _Server, tmp_path: Path) -> None:
    part = tmp_path / "x.part"
    digest = hashlib.md5(server.data).hexdigest()
    server.cuts = [100_000, 0, 0]
    with pytest.raises(
        InputError, match=r"the transfer broke 2 times .* 100000 bytes are kept in .*x\.part, run again"
    ):
        fetch(server.url, part, digest, 1 << 20, attempts=2, pause_seconds=0)
    assert fetch(server.url, part, digest, 1 << 20) == len(server.data) - 100_000
    assert server.asked[-1] == "bytes=100000-"
    assert part.read_bytes() == server.data
    assert fetch(server.url, part, digest, 1 << 20) == 0  # all there: the server answers 416


def test_server_without_ranges(server: _Server, tmp_path: Path) -> None:
    server.ranges, server.cuts = False, [100_000]
    download_publication(_publication(server), tmp_path)
    assert (tmp_path / "ml-100k" / "u.data").read_bytes() == FILES["u.data"]


def test_busy_server_is_asked_again(server: _Server, tmp_path: Path) -> None:
    server.status = [503, 429]
    assert fetch(server.url, tmp_path / "x", hashlib.md5(server.data).hexdigest(), 1 << 20, pause_seconds=0)


def test_wrong_checksum_leaves_nothing(server: _Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"md5 is .*, published is 0000"):
        download_publication(_publication(server, md5="0" * 32), tmp_path)
    assert list(tmp_path.iterdir()) == []
    # The pinned checksum of the real data set holds for a mirror as well.
    with pytest.raises(InputError, match=f"published is {PUBLICATIONS['movielens'].md5}"):
        download("movielens", tmp_path, url=server.url)
    assert list(tmp_path.iterdir()) == []


def test_left_over_of_another_file_is_fetched_afresh(server: _Server, tmp_path: Path) -> None:
    (tmp_path / ".ml-100k.zip.part").write_bytes(b"something else")
    download_publication(_publication(server), tmp_path)
    assert server.asked == ["bytes=14-", None]
    assert (tmp_path / "ml-100k" / "u.item").read_bytes() == FILES["u.item"]


@pytest.mark.parametrize(
    ("files", "folder", "message"),
    [
        (FILES | {"u.data": b"other"}, "ml-100k", r"u\.data does not have the pinned sha256"),
        ({"u.data": FILES["u.data"]}, "ml-100k", r"u\.item"),
        (FILES, "../ml-100k", "no item named"),
        ({"../../../u.item": b"x"} | FILES, "ml-100k", None),
    ],
)
def test_archives(server: _Server, tmp_path: Path, files: dict[str, bytes], folder: str, message: str | None) -> None:
    server.data = _archive(files, folder)
    out = tmp_path / "a" / "b"
    publication = _publication(server)
    if message is None:  # a member that climbs out is just not taken
        download_publication(publication, out)
        assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(FILES)
        return
    with pytest.raises(InputError, match=message):
        download_publication(publication, out)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (out / "ml-100k").exists()


def test_no_zip_and_too_large(server: _Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="more than the 1000"):
        download_publication(_publication(server, max_bytes=1000), tmp_path)
    assert list(tmp_path.iterdir()) == []
    server.data = b"no zip at all"
    with pytest.raises(InputError, match="not the published archive, removed"):
        download_publication(_publication(server), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_bad_addresses(server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="http or https"):
        download("movielens", tmp_path, url="file:///etc/passwd")
    with pytest.raises(InputError, match="download 'netflix': must be one of movielens"):
        download("netflix", tmp_path)  # type: ignore[arg-type]
    server.status = [404]
    with pytest.raises(InputError, match="the server answers 404"):
        download("movielens", tmp_path, url=server.url)
    server.server.shutdown()
    server.server.server_close()
    monkeypatch.setattr(room.time, "sleep", lambda seconds: None)
    with pytest.raises(InputError, match="the transfer broke 5 times"):
        download("movielens", tmp_path, url=server.url)
    assert list(tmp_path.iterdir()) == []


def test_pinned_files_are_the_published_ones(shared: Path) -> None:
    for name, digest in PUBLICATIONS["movielens"].files.items():
        if digest is not None:
            assert hashlib.sha256((shared / "data" / "ml-100k" / name).read_bytes()).hexdigest() == digest
