"""What `prepare` and `shards build` need of memory and time as the log grows, and how many samples a core builds.

    python benchmarks/scale_build.py --events 5e6 1e7 2e7 --parts 40 --out benchmarks/results/scale_build.json

Each log is generated: users in proportion to the events, items with skewed popularity, times in order. Both commands
run as subprocesses; the memory is that of the whole process tree, sampled ten times a second as the sum of the
processes' proportional set sizes (/proc/*/smaps_rollup: shared pages count once), beside the largest resident set of
one process as the kernel counts it. The build writes part 1 of K: all keys are placed, every row goes by, and every
K-th shard is written. The slope is a least-squares line through the peaks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
_EVENTS_PER_WRITE = 2_000_000


def generate(folder: Path, events: int, items: int, events_per_user: int) -> None:
    """Write events.csv, items.csv and a recipe."""
    import polars as pl

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    users = events // events_per_user
    with open(folder / "events.csv", "wb") as file:
        for start in range(0, events, _EVENTS_PER_WRITE):
            n = min(_EVENTS_PER_WRITE, events - start)
            columns = {
                "user": (random.random(n) ** 1.5 * users).astype(np.int64),
                "item": (random.random(n) ** 3 * items).astype(np.int64),
                "timestamp": 1_500_000_000 + np.arange(start, start + n) // 2,
            }
            pl.DataFrame(columns).write_csv(file, include_header=start == 0)
    kinds = ["Red", "Blue", "Green"]
    titles = [f"Item {item} of the {kinds[item % 3]} kind" for item in range(items)]
    pl.DataFrame({"item": np.arange(items), "title": titles}).write_csv(folder / "items.csv")
    (folder / "recipe.yaml").write_text(
        "name: generated\ndomain: movie\nsource: {kind: table, events: events.csv, items: items.csv}\n"
        "sequences: {split: leave_last_out}\n"
    )


def measured(arguments: list[str]) -> dict[str, Any]:
    """Run one command; its JSON result, seconds, and peak memory of the process tree in bytes."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "llara_dist.cli", *arguments, "--json"],
            stdout=printed,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        peak = 0
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            peak = max(peak, sum(map(_proportional, [process.pid, *_descendants(process.pid)])))
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        output = printed.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}\n{output}")
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_tree_pss_bytes": peak,
        "largest_process_rss_bytes": usage.ru_maxrss * 1024,
        "result": json.loads(output.splitlines()[-1]),
    }


def _descendants(pid: int) -> list[int]:
    found, waiting = [], [pid]
    while waiting:
        parent = waiting.pop()
        try:
            tasks = list(Path(f"/proc/{parent}/task").iterdir())
            children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue
        waiting += children
        found += children
    return found


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def build_command(folder: Path, tokenizer: Path, processes: int, samples_per_shard: int, *options: str) -> list[str]:
    """Arguments that build the shards of a generated log."""
    paths = ["--data", str(folder / "data"), "--tokenizer", str(tokenizer), "--out", str(folder / "shards")]
    size = ["--samples_per_shard", str(samples_per_shard)]
    return ["shards", "build", *paths, "--processes", str(processes), *size, *options]


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run(scratch: Path, events: int, args: argparse.Namespace, tokenizer: Path) -> dict[str, Any]:
    """Generate a log, prepare it, build a part of it; what it took."""
    folder = scratch / f"log-{events}"
    generate(folder, events, args.items, args.events_per_user)
    raw = folder_bytes(folder)
    prepared = measured(["prepare", "--recipe", str(folder / "recipe.yaml"), "--out", str(folder / "data")])
    counts = prepared.pop("result")["counts"]
    (folder / "events.csv").unlink()
    row: dict[str, Any] = {
        "events": events,
        "rows": {name: counts[name] for name in ("train", "val", "test")},
        "users": counts["users"],
        "raw_bytes": raw,
        "dataset_bytes": folder_bytes(folder / "data"),
        "prepare": prepared,
    }
    if args.parts:
        size = args.samples_per_shard
        built = measured(build_command(folder, tokenizer, args.processes, size, "--part", f"1/{args.parts}"))
        splits = built.pop("result")["splits"]
        row["build"] = {
            "part": f"1/{args.parts}",
            "processes": args.processes,
            "samples_written": sum(split["samples"] for split in splits.values()),
            "bytes_written": sum(shard["bytes"] for split in splits.values() for shard in split["shards"]),
            **built,
        }
    shutil.rmtree(folder)
    print(json.dumps(row), flush=True)
    return row


def throughput(scratch: Path, args: argparse.Namespace, tokenizer: Path) -> list[dict[str, Any]]:
    """Samples a second of whole builds of one log, on one and two processes; loading, titles and hashing included.

    A second of CPU time (of the parent and the workers) is a core's second whatever else the machine does.
    """
    folder = scratch / "throughput"
    generate(folder, args.throughput_events, args.items, args.events_per_user)
    measured(["prepare", "--recipe", str(folder / "recipe.yaml"), "--out", str(folder / "data")])
    found = []
    for processes in (1, 2):
        built = measured(build_command(folder, tokenizer, processes, 16384, "--overwrite", "true"))
        result = built["result"]
        samples = sum(split["samples"] for split in result["splits"].values())
        row = {
            "processes": processes,
            "samples": samples,
            "mean_tokens": round(sum(split["tokens"] for split in result["splits"].values()) / samples, 1),
            "seconds": result["seconds"],
            "cpu_seconds": built["cpu_seconds"],
            "samples_per_second": round(samples / result["seconds"]),
            "samples_per_second_per_process": round(samples / result["seconds"] / processes),
            "samples_per_cpu_second": round(samples / built["cpu_seconds"]),
        }
        print(json.dumps(row), flush=True)
        found.append(row)
    shutil.rmtree(folder)
    return found


def line(rows: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """The least-squares line through a command's peaks, and where it is at 10⁸ events."""
    points = [(row["events"], row[command]["peak_tree_pss_bytes"]) for row in rows if command in row]
    slope, base = np.polyfit(*np.array(points, dtype=float).T, 1)
    return {
        "bytes_per_event": round(float(slope), 1),
        "base_bytes": round(float(base)),
        "extrapolated_gib_at_1e8_events": round(float(base + slope * 1e8) / 2**30, 2),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=float, nargs="+", default=[5e6, 1e7, 2e7])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--events_per_user", type=int, default=50)
    parser.add_argument("--parts", type=int, default=40, help="build part 1 of so many; 0: no build")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples_per_shard", type=int, default=100_000)
    parser.add_argument("--throughput_events", type=int, default=300_000, help="0: no throughput")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/scale_build"))
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    from tests.tiny import write_tokenizer

    args.scratch.mkdir(parents=True)
    tokenizer = args.scratch / "tokenizer"
    write_tokenizer(
        tokenizer, [f"Item {n} of the {kind} kind, " for n in range(500) for kind in ("Red", "Blue", "Green")]
    )
    rows = [run(args.scratch, int(events), args, tokenizer) for events in args.events]
    found = {
        "what": "benchmarks/scale_build.py " + " ".join(sys.argv[1:]),
        "hardware": f"{os.cpu_count()} cores {platform.machine()}, no GPU",
        "versions": {name: version(name) for name in ("numpy", "polars", "pyarrow")}
        | {"python": platform.python_version()},
        "memory": "peak of the process tree, sum of proportional set sizes, sampled every 0.1 s",
        "runs": rows,
    }
    if len(rows) > 1:
        found["slopes"] = {command: line(rows, command) for command in ("prepare", "build") if command in rows[0]}
    if args.throughput_events:
        found["throughput"] = throughput(args.scratch, args, tokenizer)
    shutil.rmtree(args.scratch)
    print(json.dumps(found.get("slopes", {}), indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
