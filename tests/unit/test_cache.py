"""The node cache: one download a node, verified, bounded, and nothing damaged under a final name whatever is killed."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llara_dist.errors import InputError
from llara_dist.stream import remote as remote_room
from llara_dist.stream.cache import CachedFile, CacheFull, NodeCache, Stopped
from llara_dist.stream.remote import RemoteFolder, Timeouts
from tests.servers import FaultyServer, content, s3_bucket

SECRET = "hunter2SECRET"
SPAWN = multiprocessing.get_context("spawn")


def _cache(folder: Path, limit_bytes: int | None = None, attempts: int = 3) -> NodeCache:
    return NodeCache(folder / "cache", limit_bytes, attempts, backoff_seconds=0.001)


def _names(cache: NodeCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()} - {".space"}


def _wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_file_is_fetched_once(server: FaultyServer, tmp_path: Path) -> None:
    file, cache = server.put("a", 3_000_000), _cache(tmp_path)
    path = cache.fetch(file)
    assert path.read_bytes() == server.files["a"]
    assert cache.fetch(file) == path
    assert pickle.loads(pickle.dumps(cache)).fetch(pickle.loads(pickle.dumps(file))) == path
    assert server.asked["a"] == 1
    assert _names(cache) == {file.sha256}
    assert cache.usage() == 3_000_000


def test_names_are_contents(server: FaultyServer, tmp_path: Path) -> None:
    """Shards of two sets share base names; the same bytes at two addresses are kept once."""
    cache = _cache(tmp_path)
    one, other = server.put("x/000000.tar", 1000), server.put("y/000000.tar", 1000)
    server.files["z/000000.tar"] = server.files["x/000000.tar"]
    same = CachedFile(one.remote, "z/000000.tar", 1000, one.sha256)
    assert cache.fetch(one).read_bytes() == server.files["x/000000.tar"]
    assert cache.fetch(other).read_bytes() == server.files["y/000000.tar"]
    assert cache.fetch(same) == cache.fetch(one)
    assert server.asked["z/000000.tar"] == 0


@pytest.mark.parametrize(
    ("faults", "asked"),
    [
        ([("status", 503), ("status", 503)], 3),
        ([("cut", 50_000), ("wrong", None)], 3),
        ([("short", 50_000), ("longer", None)], 3),
        ([("stall", 50_000)], 2),
        ([("slow", 0.02)], 1),
    ],
)
def test_transfers_that_fail_are_tried_again(server: FaultyServer, tmp_path: Path, faults: list, asked: int) -> None:
    file = server.put("a", 100_000, RemoteFolder.open(server.url, Timeouts(30, 2 if faults[0][0] == "stall" else 30)))
    server.faults["a"] = faults
    cache = _cache(tmp_path)
    assert cache.fetch(file).read_bytes() == server.files["a"]
    assert server.asked["a"] == asked
    assert _names(cache) == {file.sha256}


@pytest.mark.parametrize(
    ("fault", "asked", "message"),
    [
        (
            ("wrong", None),
            3,
            r"/a: other bytes came than the manifest names: sha256 [0-9a-f]{64} \(3 attempts\); check",
        ),
        (("short", 999), 3, r"/a: the transfer ended early, 999 of the 1000 bytes .* \(3 attempts\); check"),
        (("longer", None), 3, r"/a: more came than the 1000 bytes .* \(3 attempts\); check"),
        (("cut", 400), 3, r"/a: the connection was cut after (0|400) of 1000 bytes \(3 attempts\); check"),
        (("status", 503), 3, r"/a: the server answers 503 after 0 of 1000 bytes \(3 attempts\); check"),
        (("status", 403), 1, r"/a: access refused \(the server answers 403\); check"),
        (("status", 404), 1, r"/a: not found \(the server answers 404\); check"),
    ],
)
def test_transfers_that_never_succeed(
    server: FaultyServer, tmp_path: Path, fault: tuple, asked: int, message: str
) -> None:
    file, cache = server.put("a", 1000), _cache(tmp_path)
    server.always["a"] = fault
    with pytest.raises(InputError, match=message) as caught:
        cache.fetch(file)
    assert server.asked["a"] == asked
    assert not caught.value.everywhere
    assert "\n" not in str(caught.value)
    assert _names(cache) == set()
    del server.always["a"]
    assert cache.fetch(file).read_bytes() == server.files["a"]


def test_bad_descriptions(server: FaultyServer, tmp_path: Path) -> None:
    remote = RemoteFolder.open(server.url)
    for sha256 in ("../../etc/passwd", "A" * 64, "a" * 63, ""):
        with pytest.raises(InputError, match=r"000000\.tar: sha256 .* is not 64 hex digits"):
            CachedFile(remote, "000000.tar", 1, sha256)
    with pytest.raises(InputError, match="-1 bytes"):
        CachedFile(remote, "000000.tar", -1, "a" * 64)
    with pytest.raises(InputError, match="must be at least 1"):
        NodeCache(tmp_path, attempts=0)


def test_a_folder_that_cannot_be_used(server: FaultyServer, tmp_path: Path) -> None:
    file = server.put("a", 1000)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"/a: cannot be kept in the cache .*/cache \(.*\); free the disk, or set"):
        _cache(tmp_path).fetch(file)


def test_a_full_disk(server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = server.put("a", 1000), _cache(tmp_path)

    def full(*arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        cache.fetch(file)
    assert _names(cache) == set()


def test_a_copy_of_another_size_is_fetched_anew(server: FaultyServer, tmp_path: Path) -> None:
    file, cache = server.put("a", 1000), _cache(tmp_path)
    os.truncate(cache.fetch(file), 10)
    assert cache.fetch(file).read_bytes() == server.files["a"]
    assert server.asked["a"] == 2


def test_discard(server: FaultyServer, tmp_path: Path) -> None:
    """A reader found damage: the copy goes if it is damaged, and stays if the reader's index is what is wrong."""
    file, cache = server.put("a", 1000), _cache(tmp_path)
    assert cache.discard(file)  # nothing there
    path = cache.fetch(file)
    assert not cache.discard(file)
    assert cache.fetch(file) == path
    assert server.asked["a"] == 1
    reading = cache.open(file)
    path.write_bytes(bytes(1000))
    assert cache.discard(file)
    assert not path.exists()
    assert os.pread(reading, 1000, 0) == bytes(1000)
    os.close(reading)
    assert cache.fetch(file).read_bytes() == server.files["a"]


# Eviction


def test_least_recently_used_goes_first(server: FaultyServer, tmp_path: Path) -> None:
    files = [server.put(name, 1000) for name in "abcd"]
    cache = _cache(tmp_path, limit_bytes=3500)
    paths = [cache.fetch(file) for file in files[:3]]
    for age, path in enumerate((paths[1], paths[2], paths[0])):
        os.utime(path, ns=(age, age))
    cache.fetch(files[1])  # used again: c is the oldest now
    cache.fetch(files[3])
    assert _names(cache) == {files[number].sha256 for number in (0, 1, 3)}
    assert cache.usage() == 3000


def _hold(cache: NodeCache, files: list[CachedFile], pipe: Any) -> None:
    for file in files:
        cache.open(file)
    pipe.send("held")
    pipe.poll(60)


def test_what_another_process_reads_is_not_evicted(server: FaultyServer, tmp_path: Path) -> None:
    a, b, c = (server.put(name, 1000) for name in "abc")
    cache = _cache(tmp_path, limit_bytes=2000)
    here, there = SPAWN.Pipe()
    holder = SPAWN.Process(target=_hold, args=(cache, [a, b], there))
    holder.start()
    try:
        assert here.poll(30)
        with pytest.raises(CacheFull, match=r"/c: 1000 bytes do not fit .* \(2000 bytes\), 2000 bytes in use; raise"):
            cache.fetch(c)
        assert _names(cache) == {a.sha256, b.sha256}
        assert server.asked["c"] == 0
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGKILL)  # the kernel drops what a dead process held
        holder.join(30)
        assert cache.fetch(c).exists()
        assert len(_names(cache)) == 2
    finally:
        holder.kill()


def test_a_file_larger_than_the_cache(server: FaultyServer, tmp_path: Path) -> None:
    cache = _cache(tmp_path, limit_bytes=999)
    with pytest.raises(CacheFull, match=r"1000 bytes do not fit.*raise data\.cache_limit_gib"):
        cache.fetch(server.put("a", 1000))
    assert _names(cache) == set()


def test_downloads_in_progress_take_room(server: FaultyServer, tmp_path: Path) -> None:
    """A download that has brought ten bytes so far counts with all it will bring; a dead one is cleared away."""
    slow, other = server.put("slow", 1500, RemoteFolder.open(server.url)), server.put("other", 1000)
    server.always["slow"] = ("stall", 10)
    cache, stop = _cache(tmp_path, limit_bytes=2000), threading.Event()
    gone: list[BaseException] = []

    def fetch() -> None:
        try:
            cache.open(slow, stop)
        except Stopped as error:
            gone.append(error)

    thread = threading.Thread(target=fetch)
    thread.start()
    _wait_for(lambda: cache.usage() == 1500)
    with pytest.raises(CacheFull, match="1500 bytes in use"):
        cache.fetch(other)
    stop.set()
    server.released.set()
    thread.join(30)
    assert len(gone) == 1
    assert _names(cache) == set()
    (cache.folder / f".{slow.sha256}.part").write_bytes(bytes(1500))  # as a killed process leaves it
    assert cache.fetch(other).exists()
    assert _names(cache) == {other.sha256}


def test_an_eviction_between_open_and_lock_is_noticed(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = server.put("a", 1000), _cache(tmp_path)
    path = cache.fetch(file)
    real, evictions = fcntl.flock, []

    def evict_first(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_SH and not evictions and path.exists():
            evictions.append(path)
            path.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", evict_first)
    descriptor = cache.open(file)
    assert evictions
    assert os.fstat(descriptor).st_nlink == 1
    assert os.pread(descriptor, 1000, 0) == server.files["a"]
    assert server.asked["a"] == 2
    # The same right after a download, where the exclusive lock turns into a lease.
    evictions.clear()
    path.unlink()
    again = cache.open(file)
    assert evictions
    assert os.fstat(again).st_nlink == 1
    for opened in (descriptor, again):
        os.close(opened)


# Many processes


def _fetch_all(cache: NodeCache, files: list[CachedFile], start: Any, seed: int) -> None:
    order = files[:]
    random.Random(seed).shuffle(order)
    start.wait(60)
    for file in order:
        descriptor = cache.open(file)
        assert hashlib.sha256(os.pread(descriptor, file.size, 0)).hexdigest() == file.sha256
        os.close(descriptor)


def _run_all(target: Any, arguments: list[tuple], start: Any) -> None:
    processes = [SPAWN.Process(target=target, args=given) for given in arguments]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def test_many_processes_one_download_a_file(server: FaultyServer, tmp_path: Path) -> None:
    files = [server.put(f"{number:06d}.tar", 200_000) for number in range(6)]
    for file in files:
        server.faults[file.name] = [("slow", 0.005)]  # so that the others do wait
    cache, start = _cache(tmp_path), SPAWN.Event()
    _run_all(_fetch_all, [(cache, files, start, seed) for seed in range(8)], start)
    assert dict(server.asked) == {file.name: 1 for file in files}
    assert _names(cache) == {file.sha256 for file in files}


def _open_and_say(cache: NodeCache, file: CachedFile, pipe: Any) -> None:
    descriptor = cache.open(file)
    pipe.send(os.pread(descriptor, 10, 0))
    pipe.poll(60)  # holds the lease


def test_who_waited_reads_while_the_downloader_holds_its_lease(server: FaultyServer, tmp_path: Path) -> None:
    """A lease of the process that downloaded lies on the file that the others waited for; it must not keep them out."""
    file, cache = server.put("a", 1000), _cache(tmp_path)
    server.faults["a"] = [("stall", 999)]  # cut when it is released; the second attempt is good
    pipes = [SPAWN.Pipe() for _ in range(4)]
    processes = [SPAWN.Process(target=_open_and_say, args=(cache, file, there)) for _, there in pipes]
    try:
        for process in processes:
            process.start()
        _wait_for(lambda: all(_has_open(process.pid, cache.folder) for process in processes))
        server.released.set()
        for here, _ in pipes:
            assert here.poll(30)
            assert here.recv() == server.files["a"][:10]
    finally:
        for process in processes:
            process.kill()
    assert server.asked["a"] == 2


def _has_open(pid: int | None, folder: Path) -> bool:
    """Whether a process has a file of the folder open."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(entry).startswith(f"{folder}/"):
                return True
        except FileNotFoundError:
            continue
    return False


def test_many_processes_in_a_cache_that_is_too_small(server: FaultyServer, tmp_path: Path) -> None:
    """Eviction and fetching at once: every process reads the right bytes, and the limit holds throughout."""
    files = [server.put(f"{number:06d}.tar", 50_000) for number in range(20)]
    cache, start = _cache(tmp_path, limit_bytes=10 * 50_000), SPAWN.Event()
    largest, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            largest[0] = max(largest[0], cache.usage())

    watcher = threading.Thread(target=watch)
    watcher.start()
    _run_all(_fetch_all, [(cache, files, start, seed) for seed in range(4)], start)
    done.set()
    watcher.join()
    assert 0 < largest[0] <= 500_000
    assert sum(server.asked.values()) > len(files)
    assert not [name for name in _names(cache) if name.endswith(".part")]


# Killed processes


def test_what_a_killed_download_left_is_taken_over(server: FaultyServer, tmp_path: Path) -> None:
    file, cache = server.put("a", 1000), _cache(tmp_path)
    cache.folder.mkdir()
    (cache.folder / f".{file.sha256}.part").write_bytes(b"x" * 5000)
    assert cache.fetch(file).read_bytes() == server.files["a"]
    assert _names(cache) == {file.sha256}


_FETCH = """
import sys
from pathlib import Path
from llara_dist.stream.cache import CachedFile, NodeCache
from llara_dist.stream.remote import RemoteFolder
url, folder = sys.argv[1:3]
cache = NodeCache(Path(folder), limit_bytes=int(sys.argv[3]), backoff_seconds=0.01)
remote = RemoteFolder.open(url)
print("ready", flush=True)
for line in sys.argv[4:]:
    name, size, sha256 = line.split(",")
    cache.fetch(CachedFile(remote, name, int(size), sha256))
print("done", flush=True)
"""


@pytest.mark.long
def test_sigkill_at_random_moments(server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """50 kills: nothing damaged is ever under a final name, and the next run completes to the same bytes."""
    cache = _cache(tmp_path)
    draw = random.Random(0)
    files = [server.put(f"{number:06d}.tar", 2_000_000) for number in range(8)]
    for file in files:
        server.always[file.name] = ("slow", 0.004)
    limit = 6 * 2_000_000  # so that eviction is among what is killed
    command = [sys.executable, "-c", _FETCH, server.url, str(cache.folder), str(limit)]
    command += [f"{file.name},{file.size},{file.sha256}" for file in files]

    def start() -> subprocess.Popen:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    kills = partial = complete = damaged = 0
    while kills < 50:
        process = start()
        time.sleep(draw.uniform(0, 0.3))
        if process.poll() is not None:
            process.communicate()
            continue
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        for path in cache.folder.iterdir() if cache.folder.exists() else ():
            partial += path.name.endswith(".part")
            if re.fullmatch(r"[0-9a-f]{64}", path.name):
                complete += 1
                damaged += hashlib.sha256(path.read_bytes()).hexdigest() != path.name
        if draw.random() < 0.3:
            for path in cache.folder.glob("[0-9a-f]*"):
                path.unlink()
    process = start()
    assert process.communicate(timeout=60)[0] == "done\n"
    with capsys.disabled():
        print(f"\n{kills} kills left {partial} partial downloads, {complete} files looked at, {damaged} damaged")
    assert damaged == 0
    assert partial > 0
    assert complete > 0
    wanted = NodeCache(cache.folder)
    for file in files:
        assert wanted.fetch(file).read_bytes() == server.files[file.name]
    assert _names(cache) == {file.sha256 for file in files}


# Object stores and credentials


def test_s3_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    names = [f"set/train/{number:06d}.tar" for number in range(3)]
    shards = {name: content(name, 300_000) for name in names}
    cache, start = _cache(tmp_path), SPAWN.Event()
    with s3_bucket(monkeypatch, "bucket", shards, SECRET) as url:
        remote_room._connect.cache_clear()
        remote = RemoteFolder.open(url)
        files = [CachedFile(remote, name, 300_000, hashlib.sha256(data).hexdigest()) for name, data in shards.items()]
        _run_all(_fetch_all, [(cache, files, start, seed) for seed in range(2)], start)
        for file in files:
            assert cache.fetch(file).read_bytes() == shards[file.name]
        wrong = CachedFile(remote, names[0], 300_000, "0" * 64)
        with pytest.raises(InputError, match=r"s3://bucket/set/train/000000\.tar: other bytes came") as caught:
            cache.fetch(wrong)
    remote_room._connect.cache_clear()
    assert _names(cache) == {file.sha256 for file in files}
    assert SECRET not in str(caught.value) + caplog.text
    assert not [path for path in cache.folder.iterdir() if SECRET.encode() in path.read_bytes()]


def test_a_redirect_with_a_signature_leaves_no_trace(
    server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    cache, file = _cache(tmp_path), server.put("a", 1000)
    server.files["there"] = server.files["a"]
    server.always["a"] = ("redirect", f"/there?X-Amz-Signature={SECRET}")
    server.faults["there"] = [("status", 403)]
    with pytest.raises(InputError, match=r"/a: access refused") as caught:
        cache.fetch(file)
    server.faults["there"] = [("cut", 10), ("wrong", None)]
    assert cache.fetch(file).exists()
    assert SECRET not in str(caught.value) + caplog.text
    assert not [path for path in cache.folder.iterdir() if SECRET.encode() in path.read_bytes() + path.name.encode()]
