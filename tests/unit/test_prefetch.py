"""The look-ahead: fetches in plan order below its horizon, holds what is needed soon, never ends or stalls a run."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llara_dist.errors import InputError
from llara_dist.stream.cache import CachedFile, CacheFull, NodeCache
from llara_dist.stream.prefetch import Need, Prefetcher
from llara_dist.stream.remote import RemoteFolder, Timeouts
from tests.servers import FaultyServer


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _cache(folder: Path, limit_bytes: int | None = None) -> NodeCache:
    return NodeCache(folder / "cache", limit_bytes, attempts=2, backoff_seconds=0.001)


def _present(cache: NodeCache, files: list[CachedFile]) -> list[int]:
    return [number for number, file in enumerate(files) if (cache.folder / file.sha256).exists()]


def _open_descriptors(cache: NodeCache) -> int:
    """How many of the cache's files this process has open."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += os.readlink(entry).startswith(str(cache.folder))
        except FileNotFoundError:
            continue
    return count


def _held(prefetcher: Prefetcher) -> int:
    """How many files are leased."""
    return sum(lease.descriptor is not None for lease in list(prefetcher._leases.values()))


def _steps(files: list[CachedFile]) -> list[Need]:
    """File n is needed at step n alone."""
    return [Need(number, number, file) for number, file in enumerate(files)]


def test_fetches_in_plan_order_below_the_horizon(server: FaultyServer, tmp_path: Path) -> None:
    files = [server.put(f"{number}", 1000) for number in range(10)]
    cache, drawn = _cache(tmp_path), []

    def needs() -> Iterator[Need]:
        for need in _steps(files):
            drawn.append(need.first_step)
            yield need

    with Prefetcher(cache, needs(), ahead_bytes=3000) as prefetcher:
        _wait_for(lambda: _present(cache, files) == [0, 1, 2] and len(drawn) == 4)
        prefetcher.at_step(2)
        _wait_for(lambda: _present(cache, files) == [0, 1, 2, 3, 4] and len(drawn) == 6)
        _wait_for(lambda: _held(prefetcher) == 3)
        assert _open_descriptors(cache) == 3
    assert _open_descriptors(cache) == 0
    assert drawn == [0, 1, 2, 3, 4, 5]
    assert max(server.asked.values()) == 1


def test_an_endless_plan_is_not_drained(server: FaultyServer, tmp_path: Path) -> None:
    """Two files for ever: needs of a held file cost no bytes, and still are not drawn without end."""
    files = [server.put(f"{number}", 1000) for number in range(2)]
    cache, drawn = _cache(tmp_path), itertools.count()
    last = [0]

    def needs() -> Iterator[Need]:
        for step in drawn:
            last[0] = step
            yield Need(step, step, files[step % 2])

    with Prefetcher(cache, needs(), ahead_bytes=10_000) as prefetcher:
        _wait_for(lambda: last[0] == 4095 and _held(prefetcher) == 2)
        prefetcher.at_step(100)
        _wait_for(lambda: last[0] == 4195)
        assert _open_descriptors(cache) == 2
    assert server.asked == {"0": 1, "1": 1}


def test_what_is_needed_soon_is_not_evicted(server: FaultyServer, tmp_path: Path) -> None:
    files = [server.put(f"{number}", 1000) for number in range(3)]
    other = server.put("other", 1000)
    cache = _cache(tmp_path, limit_bytes=3000)
    needs = [Need(0, 0, files[0]), Need(0, 5, files[1]), Need(1, 1, files[2]), Need(4, 6, files[0])]
    with Prefetcher(cache, needs, ahead_bytes=3000) as prefetcher:
        _wait_for(lambda: _held(prefetcher) == 3)
        prefetcher.at_step(1)  # file 0 is needed again at step 4
        with pytest.raises(CacheFull):
            cache.fetch(other)
        prefetcher.at_step(2)  # file 2 is done
        cache.fetch(other)
        assert _present(cache, [*files, other]) == [0, 1, 3]
    assert server.asked["0"] == 1


def test_a_file_beyond_the_horizon_alone(server: FaultyServer, tmp_path: Path) -> None:
    files = [server.put(f"{number}", 1000) for number in range(3)]
    cache = _cache(tmp_path)
    with Prefetcher(cache, _steps(files), ahead_bytes=1) as prefetcher:
        for step in range(3):
            prefetcher.at_step(step)
            _wait_for(lambda step=step: _present(cache, files) == list(range(step + 1)))


def test_a_resumed_run_begins_at_its_step(server: FaultyServer, tmp_path: Path) -> None:
    files = [server.put(f"{number}", 1000) for number in range(6)]
    cache = _cache(tmp_path)
    prefetcher = Prefetcher(cache, _steps(files), ahead_bytes=2000)
    prefetcher.at_step(3)
    prefetcher.start()
    _wait_for(lambda: _present(cache, files) == [3, 4])
    prefetcher.close()


def test_a_full_cache_stops_the_look_ahead_and_it_goes_on_later(
    server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [server.put(f"{number}", 1000) for number in range(4)]
    other = server.put("other", 1000)
    cache = _cache(tmp_path, limit_bytes=2000)
    reading = cache.open(other)
    with Prefetcher(cache, _steps(files), ahead_bytes=4000) as prefetcher:
        # Whichever of the four downloads took the room first: the file that is needed first has it in the end.
        _wait_for(lambda: prefetcher._full and _present(cache, files) == [0])
        os.close(reading)
        prefetcher.at_step(0)
        _wait_for(lambda: len(_present(cache, files)) == 2)
        for step in range(1, 4):
            prefetcher.at_step(step)
            _wait_for(lambda step=step: step in _present(cache, files))
    assert not caplog.records  # no room is no error


def test_errors_are_left_to_the_reader(server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [server.put(f"{number}", 1000) for number in range(8)]
    for number in (1, 2, 3):
        server.always[f"{number}"] = ("status", 403)
    server.always["5"] = ("redirect", "/gone?X-Amz-Signature=hunter2SECRET")
    cache = _cache(tmp_path)
    caplog.set_level(logging.WARNING)
    with Prefetcher(cache, _steps(files), ahead_bytes=8000, downloads=1):
        _wait_for(lambda: _present(cache, files) == [0, 4, 6, 7])
        asked = dict(server.asked)
        with pytest.raises(InputError, match="/1: access refused"):
            cache.fetch(files[1])
        assert server.asked["1"] == asked["1"] + 1
    assert asked["1"] == 1  # not asked for again and again
    assert len(caplog.records) == 1  # said once
    assert "/1: access refused" in caplog.text
    assert "hunter2SECRET" not in caplog.text


def test_a_plan_that_fails_is_said_and_does_not_end_the_run(
    server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, cache = server.put("a", 1000), _cache(tmp_path)

    def needs() -> Iterator[Need]:
        yield Need(0, 0, file)
        raise RuntimeError("no plan")

    with Prefetcher(cache, needs(), ahead_bytes=8000) as prefetcher:
        _wait_for(lambda: caplog.records and _present(cache, [file]))
        prefetcher.at_step(1)
    assert "RuntimeError" in caplog.text
    assert _open_descriptors(cache) == 0


def test_at_step_does_not_wait_for_downloads_and_close_ends_them(server: FaultyServer, tmp_path: Path) -> None:
    remote = RemoteFolder.open(server.url, Timeouts(5, 60))
    files = [server.put(f"{number}", 1000, remote) for number in range(2)]
    server.always["0"] = server.always["1"] = ("stall", 10)
    cache = _cache(tmp_path)
    prefetcher = Prefetcher(cache, _steps(files), ahead_bytes=8000)
    prefetcher.start()
    _wait_for(lambda: sum(server.asked.values()) == 2)
    prefetcher.at_step(1)  # returns although both downloads hang
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("prefetch-")]
    assert len(threads) == 4
    server.released.set()
    prefetcher.close()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert _open_descriptors(cache) == 0
    assert not list(cache.folder.glob(".*.part"))


def test_a_download_whose_steps_are_over_is_not_held(server: FaultyServer, tmp_path: Path) -> None:
    file = server.put("a", 1000)
    server.faults["a"] = [("stall", 10)]
    cache = _cache(tmp_path)
    with Prefetcher(cache, [Need(0, 0, file)], ahead_bytes=8000) as prefetcher:
        _wait_for(lambda: server.asked["a"] == 1)
        prefetcher.at_step(1)
        server.released.set()
        _wait_for(lambda: _present(cache, [file]) == [0] and _open_descriptors(cache) == 0)


def test_close_without_start(server: FaultyServer, tmp_path: Path) -> None:
    Prefetcher(_cache(tmp_path), [], 1).close()
    with pytest.raises(ValueError, match="at least 1"):
        Prefetcher(_cache(tmp_path), [], 1, downloads=0)
