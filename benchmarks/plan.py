"""What a plan costs and what it makes the nodes fetch, at 10^8 samples; how evenly it spreads users and work.

    python benchmarks/plan.py --data DATASET --shards SHARDS [--samples 100000000] [--out benchmarks/results/plan.json]

DATASET and SHARDS (built from it) are real: user pairs and row lengths are measured on them. For the rest an index of
`--samples` rows is written (32 bytes a row, under $TMPDIR) over shards that exist by name and size only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llara_dist.data.dataset import load_dataset
from llara_dist.data.shard_index import INDEX, IndexWriter, ShardIndex
from llara_dist.data.shards import FORMAT_VERSION, MANIFEST, SHARDS, seal
from llara_dist.hashing import hash64
from llara_dist.integrity import write_json
from llara_dist.stream.loader import StepLoader
from llara_dist.stream.order import Source
from llara_dist.stream.plan import Plan
from llara_dist.stream.reader import ShardSet
from llara_dist.stream.share import share_out

MIB = 2**20
BYTES_PER_SAMPLE = 2560
SHARD_BYTES = 256 * MIB
RANKS_PER_NODE = 8


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=10**8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {
        "hardware": f"{os.cpu_count()} shared {platform.machine()} CPU cores",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "locality": [locality(options.samples, nodes) for nodes in (1, 8, 128)],
        "users": users(options.data, options.shards),
        "balance": balance(options.shards, options.samples),
        "resume": resume(options.shards),
    }
    with tempfile.TemporaryDirectory() as folder:
        result["scale"] = scale(Path(folder), options.samples)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def imaginary(samples: int) -> Source:
    """So many samples in shards of 256 MiB."""
    per_shard = SHARD_BYTES // BYTES_PER_SAMPLE
    counts = np.full(-(-samples // per_shard), per_shard)
    counts[-1] = samples - per_shard * (len(counts) - 1)
    return Source("imaginary", np.cumsum(counts) - counts, counts, counts * BYTES_PER_SAMPLE, np.zeros_like(counts))


def locality(samples: int, nodes: int) -> dict[str, float]:
    """Bytes that the nodes fetch in an epoch, as a multiple of the data set's."""
    source = imaginary(samples)
    world = nodes * RANKS_PER_NODE
    plan = Plan([source], seed=0, global_batch=8192, epochs=1)
    kept = dropped = held = 0
    for node in range(nodes):
        needs = np.array(list(plan.needs(0, range(node * RANKS_PER_NODE, (node + 1) * RANKS_PER_NODE), world)))
        dropped += int(source.bytes[needs[:, 3]].sum())
        kept += int(source.bytes[np.unique(needs[:, 3])].sum())
        edges = np.concatenate([needs[:, 0], needs[:, 1] + 1])
        change = np.concatenate([source.bytes[needs[:, 3]], -source.bytes[needs[:, 3]]])
        held = max(held, int(np.cumsum(change[np.lexsort((-change, edges))]).max()))
    total = int(source.bytes.sum())
    return {
        "nodes": nodes,
        "ranks": world,
        "samples": samples,
        "shards": len(source.samples),
        "data_GiB": round(total / 2**30, 1),
        "fetched_over_data": round(kept / total, 4),
        "fetched_over_data_if_dropped_after_use": round(dropped / total, 4),
        "needed_at_once_on_a_node_GiB": round(held / 2**30, 2),
    }


def users(data: Path, shards: Path) -> list[dict[str, float]]:
    """Pairs of one user's windows in a step, as a multiple of what a uniform shuffle is expected to have."""
    opened = ShardSet.open(shards, "train")
    rows = load_dataset(data).train
    user = rows.users[np.searchsorted(rows.keys, opened.all.keys)]
    found = []
    for batch in (128, 512, 8192):
        plan = Plan(opened.sources, seed=0, global_batch=batch, epochs=4)
        pairs = expected = 0.0
        for step in range(plan.num_steps):
            ids = plan.step(step)
            counts = np.bincount(user[ids])
            pairs += (counts * (counts - 1) // 2).sum()
            of_pass = np.bincount(user[: len(rows)]).astype(float)  # each pass holds the same rows
            n = len(rows)
            expected += (of_pass * (of_pass - 1)).sum() / (n * (n - 1)) * len(ids) * (len(ids) - 1) / 2
        found.append(
            {
                "global_batch": batch,
                "epochs": plan.epochs,
                "pairs": pairs,
                "expected_of_a_uniform_shuffle": round(expected, 1),
                "ratio": round(pairs / expected, 4),
            }
        )
    return found


def balance(shards: Path, samples: int) -> list[dict[str, float]]:
    """Share of positions in which a rank waits for the heaviest, with real row lengths, half of the rows hybrid."""
    info = ShardSet.open(shards, "train").all
    found = []
    for nodes, batch, budget in ((1, 128, 8192), (8, 512, 8192), (128, 8192, 8192), (128, 8192, 1536)):
        world = nodes * RANKS_PER_NODE
        plan = Plan([imaginary(samples)], seed=0, global_batch=batch, epochs=1)
        for where in ("own_shards", "one_file_system"):
            waits, turns = [], set()
            for step in range(0, plan.num_steps, plan.num_steps // 20):
                ids = plan.step(step)
                rows = ids % len(info.keys)
                lengths = info.tokens[rows] - np.where(hash64(1, ids) & np.uint64(1), 0, info.slots[rows])
                sizes = [RANKS_PER_NODE] * nodes if where == "own_shards" else [world]
                loads = share_out(lengths, sizes, plan.homes(step, world), budget, only=0).loads
                waits.append(1 - loads.sum() / (world * loads.max(axis=0).sum()))
                turns.add(loads.shape[1])
            found.append(
                {
                    "nodes": nodes,
                    "ranks": world,
                    "global_batch": batch,
                    "max_tokens_per_microbatch": budget,
                    "rows_may_move": "within a node" if where == "own_shards" else "anywhere",
                    "microbatches": sorted(turns),
                    "waiting_share": round(float(np.mean(waits)), 4),
                }
            )
    return found


def resume(shards: Path) -> dict[str, float]:
    """From nothing open to the first batch of a step somewhere in a run of five epochs, on one rank."""
    found = []
    for part in np.linspace(0.05, 0.95, 7):
        started = time.perf_counter()
        opened = ShardSet.open(shards, "train")
        plan = Plan(opened.sources, seed=0, global_batch=128, epochs=5)
        first = int(part * plan.num_steps)
        step = next(iter(StepLoader(opened, plan, always, first_step=first)))
        assert step.index == first
        found.append(time.perf_counter() - started)
    return {
        "samples": len(opened),
        "median_s": round(float(np.median(found)), 3),
        "max_s": round(max(found), 3),
    }


def always(step: int, keys: np.ndarray, passes: np.ndarray) -> np.ndarray:
    """Every sample hybrid."""
    return np.ones(len(keys), dtype=bool)


def scale(folder: Path, samples: int) -> dict[str, object]:
    """Open, seek and plan with an index of so many rows."""
    started = time.perf_counter()
    write_imaginary(folder, imaginary(samples))
    written = time.perf_counter() - started
    before = memory()
    opened, open_s = timed(lambda: ShardSet.open(folder, "train"))
    plan = Plan(opened.sources, seed=0, global_batch=8192, epochs=2)
    _, first_s = timed(lambda: opened.lookup(plan.step(plan.num_steps // 3)))
    after_first = memory()
    near = [timed(lambda s=s: plan.step(s))[1] for s in range(100, 120)]
    far = [timed(lambda s=s: plan.step(s))[1] for s in np.linspace(0, plan.steps_per_epoch - 1, 20).astype(int)]
    # What is left of a step when the shards under the lanes have been looked at: the run's steady state.
    nodes = (RANKS_PER_NODE,) * 128
    steps = range(plan.num_steps // 3, plan.num_steps // 3 + 20)
    own = [timed(lambda s=s: share_step(opened, plan, s, nodes))[1] for s in steps]
    flat = [timed(lambda s=s: share_step(opened, plan, s, (1024,)))[1] for s in steps]
    for step in np.linspace(0, plan.steps_per_epoch - 1, 60).astype(int):
        opened.lookup(plan.step(int(step)))
    after_all = memory()
    index = (folder / "train" / INDEX).stat().st_size
    return {
        "samples": samples,
        "index_GB": round(index / 1e9, 2),
        "write_index_s": round(written, 1),
        "open_s": round(open_s, 3),
        "first_step_anywhere_s": round(first_s, 3),
        "seek_ms_neighbours_median": round(1e3 * float(np.median(near)), 3),
        "seek_ms_anywhere_median": round(1e3 * float(np.median(far)), 3),
        "plan_step_8192_over_1024_ranks_ms": {
            "128 nodes, own shards": {"median": round(1e3 * float(np.median(own)), 2), "max": round(1e3 * max(own), 2)},
            "one file system": {"median": round(1e3 * float(np.median(flat)), 2), "max": round(1e3 * max(flat), 2)},
        },
        "memory_MiB": {
            "before": before,
            "after_the_first_step": after_first,
            "after_steps_all_over_the_epoch": after_all,
            "note": "private = this process's alone; mapped = pages of the index, shared by all processes of a node",
        },
    }


def share_step(opened: ShardSet, plan: Plan, step: int, nodes: tuple[int, ...]) -> None:
    """All that a rank does to plan a step."""
    ids = plan.step(step)
    info = opened.lookup(ids)
    hybrid = (hash64(3, step, info.keys) & np.uint64(1)).astype(bool)
    lengths = info.tokens - np.where(hybrid, 0, info.slots)
    homes = plan.homes(step, sum(nodes)) if len(nodes) > 1 else None
    share_out(lengths, nodes, homes, 8192, only=5)


def timed(call: Callable[[], object]) -> tuple[object, float]:
    """A call's value and seconds."""
    started = time.perf_counter()
    value = call()
    return value, time.perf_counter() - started


def memory() -> dict[str, float]:
    """MiB of this process: private to it, and file pages that it maps."""
    found = dict.fromkeys(("Private_Clean", "Private_Dirty", "Rss", "Anonymous"), 0)
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        if name[:-1] in found:
            found[name[:-1]] = int(value)
    return {"private": round(found["Anonymous"] / 1024), "mapped": round((found["Rss"] - found["Anonymous"]) / 1024)}


def write_imaginary(folder: Path, source: Source) -> None:
    """A shards folder whose tars are holes of the right size, and whose index is whole."""
    (folder / "train").mkdir()
    writer = IndexWriter(folder / "train" / INDEX)
    shards = []
    for number, (first, samples, size) in enumerate(
        zip(source.first_ids.tolist(), source.samples.tolist(), source.bytes.tolist(), strict=True)
    ):
        keys = np.arange(first, first + samples, dtype=np.uint64)
        noise = hash64(7, keys)
        writer.write(
            ShardIndex(
                keys=keys,
                offsets=np.arange(samples, dtype=np.int64) * BYTES_PER_SAMPLE + 512,
                sizes=np.full(samples, BYTES_PER_SAMPLE - 512, dtype=np.int32),
                tokens=(280 + (noise % np.uint64(100)).astype(np.int32)).astype(np.int32),
                slots=np.full(samples, 30, dtype=np.int32),
                answer_tokens=(3 + (noise % np.uint64(7)).astype(np.int32)).astype(np.int32),
                crc32=(noise >> np.uint64(32)).astype(np.uint32),
            )
        )
        name = f"{number:06d}.tar"
        with open(folder / "train" / name, "wb") as file:
            file.truncate(size)
        shards.append({"name": name, "pass": 0, "samples": samples, "bytes": size, "sha256": "0" * 64})
    manifest = seal(
        {
            "format_version": FORMAT_VERSION,
            "split": "train",
            "passes": 1,
            "samples": int(source.samples.sum()),
            "shards": shards,
            "index": writer.close(),
        }
    )
    write_json(folder / "train" / MANIFEST, manifest)
    split = {"hash": manifest["hash"], "longest_row_tokens": 380, "samples": manifest["samples"]}
    write_json(folder / SHARDS, seal({"format_version": FORMAT_VERSION, "splits": {"train": split}}))


if __name__ == "__main__":
    main()
