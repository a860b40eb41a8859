"""The reader against its peers, and the build against the obvious way, on the same samples in one run.

    python benchmarks/stream.py --shards SHARDS [--data DATASET --tokenizer TOKENIZER] [--out RESULT.json]

The peers are in benchmarks/peers.txt. All arms read pass 0 of the train split in one process without workers, from a
warm page cache, and end in the same thing: hybrid `Batch`es of at most 8,192 positions. An arm is one endless iterator
in a process of its own, since some peers leave threads running that would slow the others; it goes on where it stopped:
opening and the first fill of a shuffle buffer are outside the windows. Arms take turns, window by window; the order
turns from round to round. Medians over the rounds; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import versions
from llara_dist.data.samples import ARRAYS, Sample, unpack
from llara_dist.stream.batch import Batch, collate
from llara_dist.stream.loader import StepLoader
from llara_dist.stream.plan import Plan
from llara_dist.stream.reader import ShardSet

BUDGET = 8192
"""positions of a packed row"""
GLOBAL_BATCH = 128
SHUFFLE_BUFFER = 1000
LIBRARIES = ("torch", "numpy", "pyarrow", "msgpack", "tokenizers", "webdataset", "datasets", "mosaicml-streaming")
OURS = "llara_dist"


@dataclass(frozen=True)
class Arm:
    """One way to read: each call begins an epoch with its own seed."""

    samples: Callable[[int], Iterable[Sample]]
    batches: Callable[[int], Iterable[Batch]]


NUMBERS = ("key", "pass", "num_history", "target_index", "answer_start", "answer_end")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="with --tokenizer: the build is measured as well")
    parser.add_argument("--tokenizer")
    parser.add_argument("--build_rows", type=int, default=6000, help="rows that the obvious way builds")
    parser.add_argument("--build_rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of a window")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hardware", default=f"{os.cpu_count()} {platform.machine()} CPU cores")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        result = {
            "what": "benchmarks/stream.py",
            "hardware": options.hardware,
            "load_average_before": os.getloadavg(),
            "versions": versions(LIBRARIES),
            **compare_readers(options.shards, scratch, options.seconds, options.rounds),
        }
        if options.data is not None and options.tokenizer is not None:
            print(json.dumps(result["arms"], indent=2), flush=True)
            result["build"] = compare_builds(
                options.data, options.tokenizer, options.build_rows, options.build_rounds, scratch
            )
    result["seconds"] = round(time.perf_counter() - begun, 1)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def compare_readers(shards: Path, scratch: Path, seconds: float, rounds: int) -> dict[str, Any]:
    """All arms on pass 0 of the train split."""
    opened = ShardSet.open(shards, "train")
    entries = [shard for shard in opened.manifest["shards"] if shard["pass"] == 0]
    urls = [str(shards / "train" / shard["name"]) for shard in entries]
    samples = opened.read(np.arange(sum(shard["samples"] for shard in entries)))
    expected = np.unique(np.array([sample.key for sample in samples], dtype=np.uint64))
    mean_tokens = statistics.mean(len(sample.tokens) for sample in samples)
    parquet, mds = scratch / "samples.parquet", scratch / "mds"
    write_parquet(samples, parquet)
    write_mds(samples, mds)
    del samples
    form, forms = fastest_form(parquet, min(1.0, seconds))
    arms = {
        OURS: partial(our_arm, shards),
        "webdataset": partial(streamed, partial(webdataset_samples, urls, True)),
        "webdataset, bytes": partial(streamed, partial(webdataset_samples, urls, False)),
        "datasets, streaming": partial(streamed, partial(parquet_samples, parquet, form)),
        "mosaicml-streaming": partial(streamed, partial(mosaic_samples, mds)),
    }
    epochs, rates = measure(arms, expected, seconds, rounds)
    return {
        "samples": {"pass_0": len(expected), "mean_tokens": round(mean_tokens, 1), "tars": len(urls)},
        "windows": {"seconds": seconds, "rounds": rounds},
        "datasets_form": {"used": form, "samples_per_second_of_each": forms},
        "one_epoch": epochs,
        "arms": rates,
    }


def packed(samples: Iterable[Sample]) -> Iterator[Batch]:
    """Greedy packing to the budget, as a stream allows it."""
    waiting: list[Sample] = []
    used = 0
    for sample in samples:
        if used + len(sample.tokens) > BUDGET:
            yield collate(waiting, np.ones(len(waiting), dtype=bool))
            waiting, used = [], 0
        waiting.append(sample)
        used += len(sample.tokens)
    yield collate(waiting, np.ones(len(waiting), dtype=bool))


def streamed(samples: Callable[[int], Iterable[Sample]]) -> Arm:
    """An arm whose batches are its samples, packed as they come."""
    return Arm(samples, lambda seed: packed(samples(seed)))


def our_arm(folder: Path) -> Arm:
    """Plan, ranged reads, every crc32 compared, steps balanced over micro-batches."""
    shards = ShardSet.open(folder, "train")

    def samples(seed: int) -> Iterator[Sample]:
        plan = Plan(shards.sources, seed, GLOBAL_BATCH, epochs=1)
        for step in range(plan.num_steps):
            yield from shards.read(plan.step(step))

    def batches(seed: int) -> Iterator[Batch]:
        plan = Plan(shards.sources, seed, GLOBAL_BATCH, epochs=1)
        for step in StepLoader(shards, plan, all_hybrid, max_tokens_per_microbatch=BUDGET):
            yield from step.microbatches

    return Arm(samples, batches)


def all_hybrid(step: int, keys: np.ndarray, passes: np.ndarray) -> np.ndarray:
    """The draw of a curriculum at its end."""
    return np.ones(len(keys), dtype=bool)


def sample_of(row: dict[str, Any], array: Callable[[str], np.ndarray]) -> Sample:
    """A Sample from a peer's record: numbers from `row`, arrays from `array`."""
    numbers = {name: int(row[name]) for name in NUMBERS}
    numbers["pass_index"] = numbers.pop("pass")
    return Sample(**numbers, **{name: array(name) for name in ARRAYS})


def from_bytes(row: dict[str, Any]) -> Sample:
    """What a stock msgpack decoder made of a tar member."""
    return sample_of(row, lambda name: np.frombuffer(row[name], dtype=ARRAYS[name]))


def from_values(row: dict[str, Any]) -> Sample:
    """A row of lists or arrays."""
    return sample_of(row, lambda name: np.asarray(row[name], dtype=ARRAYS[name]))


def from_arrow(table: Any) -> Sample:
    """A pyarrow table of one row; its lists are viewed, not converted."""
    row = {name: table.column(name)[0].as_py() for name in NUMBERS}
    return sample_of(row, lambda name: table.column(name)[0].values.to_numpy(zero_copy_only=True).view(ARRAYS[name]))


def webdataset_samples(urls: list[str], decode: bool, seed: int) -> Iterator[Sample]:
    """Plain webdataset, with its own decoder or with nothing but our `unpack` on the member's bytes."""
    import webdataset

    pipeline = webdataset.WebDataset(urls, shardshuffle=100, seed=seed).shuffle(SHUFFLE_BUFFER)
    if decode:
        return (from_bytes(record["mp"]) for record in pipeline.decode())
    return (unpack(record["mp"]) for record in pipeline)


def write_parquet(samples: Iterable[Sample], path: Path) -> None:
    """One Parquet file in row groups of 1,000, lists of int32."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = dict.fromkeys(NUMBERS, pa.int64()) | dict.fromkeys(ARRAYS, pa.list_(pa.int32()))
    schema = pa.schema(list(columns.items()))
    rows = iter(samples)
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, 1000)):
            records = [record_of(sample, np.int32) for sample in group]
            writer.write_table(pa.Table.from_pylist(records, schema))


def parquet_samples(path: Path, form: str, seed: int) -> Iterator[Sample]:
    """Hugging Face datasets, streaming; `form` is what rows come as: python, numpy or arrow."""
    import datasets

    rows: Any = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    if form != "python":
        rows = rows.with_format(form)
    return map(from_arrow if form == "arrow" else from_values, rows)


def fastest_form(path: Path, seconds: float) -> tuple[str, dict[str, int]]:
    """The form in which Hugging Face datasets yields most samples/s here, and what each yields."""
    rates = {}
    for form in ("python", "numpy", "arrow"):
        rows = iter(parquet_samples(path, form, 0))
        next(rows)
        done, wall, _ = window(rows, seconds, lambda sample: 1)
        rates[form] = round(done / wall)
    return max(rates, key=lambda form: rates[form]), rates


def mosaic() -> Any:
    """mosaicml-streaming, without its image data sets where there is no torchvision."""
    if find_spec("torchvision") is None:
        sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
    import streaming

    return streaming


def write_mds(samples: Iterable[Sample], folder: Path) -> None:
    """MDS shards of the library's default size."""
    encodings = dict.fromkeys(NUMBERS, "int") | {name: f"ndarray:{ARRAYS[name].name}" for name in ARRAYS}
    with mosaic().MDSWriter(out=str(folder), columns=encodings) as writer:
        for sample in samples:
            writer.write(record_of(sample))


def mosaic_samples(folder: Path, seed: int) -> Iterator[Sample]:
    """mosaicml-streaming from a local folder."""
    rows = mosaic().StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=seed, batch_size=GLOBAL_BATCH)
    return map(from_values, rows)


def record_of(sample: Sample, dtype: Any = None) -> dict[str, Any]:
    """A sample's fields under the names of the shard format; arrays as `dtype`, else as they are."""
    numbers = {name: getattr(sample, "pass_index" if name == "pass" else name) for name in NUMBERS}
    arrays = {name: getattr(sample, name) for name in ARRAYS}
    return numbers | {name: array if dtype is None else array.astype(dtype) for name, array in arrays.items()}


def window(items: Iterator[Any], seconds: float, size: Callable[[Any], int]) -> tuple[int, float, float]:
    """Take items for so many seconds; the sum of their sizes, wall seconds, CPU seconds of all threads."""
    begun, cpu, done = time.perf_counter(), time.process_time(), 0
    while (wall := time.perf_counter() - begun) < seconds:
        done += size(next(items))
    return done, wall, time.process_time() - cpu


def read_through(make: Callable[[], Arm], expected: np.ndarray) -> dict[str, int]:
    """One whole epoch, untimed: warms the page cache and counts; `expected` are the keys, sorted."""
    keys = np.array([sample.key for sample in make().samples(0)], dtype=np.uint64)
    return {
        "samples": len(keys),
        "repeated": len(keys) - len(np.unique(keys)),
        "missing": len(np.setdiff1d(expected, keys)),
    }


_ITEMS: Iterator[Any] = iter(())
"""what this process's windows go on with"""


def begin(make: Callable[[], Arm], kind: str) -> None:
    """Make this process's endless iterator and take the first item."""
    global _ITEMS
    epoch = getattr(make(), kind)
    _ITEMS = (item for seed in count(1) for item in epoch(seed))
    next(_ITEMS)


def batch_window(seconds: float) -> dict[str, float]:
    """A window of batches."""
    seen: list[tuple[int, int]] = []
    rows, wall, cpu = window(_ITEMS, seconds, partial(note, seen))
    tokens = sum(batch_tokens for _, batch_tokens in seen)
    return {
        "samples_per_second": rows / wall,
        "tokens_per_second": tokens / wall,
        "samples_per_cpu_second": rows / cpu,
        "tokens_per_batch": tokens / len(seen),
    }


def sample_window(seconds: float) -> dict[str, float]:
    """A window of samples, neither packed nor collated."""
    read, wall, cpu = window(_ITEMS, seconds, lambda sample: 1)
    return {"reading_only_samples_per_second": read / wall, "reading_only_samples_per_cpu_second": read / cpu}


def note(seen: list[tuple[int, int]], batch: Batch) -> int:
    """Note a batch's samples and tokens."""
    seen.append((batch.num_samples, batch.num_tokens))
    return batch.num_samples


def measure(
    arms: dict[str, Callable[[], Arm]], expected: np.ndarray, seconds: float, rounds: int
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, Any]]]:
    """An epoch of each arm, counted, then interleaved windows; what each reached, and ours over it."""
    kinds = {"batches": batch_window, "samples": sample_window}
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in arms}
    epochs, names = {}, list(arms)
    with ExitStack() as stack:
        pools = {}
        for name, make in arms.items():
            for kind in kinds:
                pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
                pools[name, kind] = stack.enter_context(pool)
                if kind == "samples":
                    epochs[name] = pool.submit(read_through, make, expected).result()
                pool.submit(begin, make, kind).result()
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                for kind, run in kinds.items():
                    for key, value in pools[name, kind].submit(run, seconds).result().items():
                        rates[name].setdefault(key, []).append(value)
        # Threads that a peer leaves waiting would keep its process from ending.
        for pool in pools.values():
            for process in list(pool._processes.values()):
                process.terminate()
    return epochs, {
        name: {
            **{key: spread(values) for key, values in found.items()},
            "ours_over_this": {key: ratios(rates[OURS][key], found[key]) for key in found if key != "tokens_per_batch"},
        }
        for name, found in rates.items()
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": round(statistics.median(values), 2), "min": round(min(values), 2), "max": round(max(values), 2)}


def ratios(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median and range of the rounds' ratios."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])


def compare_builds(data: Path, tokenizer: str, rows: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """`shards build` on one process against formatting and tokenising each row's whole string."""
    from llara_dist.data.build import build

    obvious_build = ObviousBuild(data, tokenizer, rows)
    samples = 0
    ours: dict[str, list[float]] = {"samples_per_second": [], "samples_per_cpu_second": []}
    obvious: dict[str, list[float]] = {"samples_per_second": [], "samples_per_cpu_second": []}
    for turn in range(rounds):
        begun, cpu = time.perf_counter(), time.process_time()
        info = build(data, tokenizer, scratch / f"built-{turn}", processes=1)
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        samples = sum(split["samples"] for split in info["splits"].values())
        ours["samples_per_second"].append(samples / wall)
        ours["samples_per_cpu_second"].append(samples / cpu)
        begun, cpu = time.perf_counter(), time.process_time()
        obvious_build.write(scratch / f"obvious-{turn}")
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        obvious["samples_per_second"].append(rows / wall)
        obvious["samples_per_cpu_second"].append(rows / cpu)
    return {
        "ours": {
            "what": "shards build, processes=1: loading, checks, titles tokenised, hashing, writing, index",
            "samples": samples,
            **{key: spread(values) for key, values in ours.items()},
        },
        "obvious": {
            "what": "each row formatted, tokenised whole, written by ShardWriter; loading, draws and slots left out",
            "samples": rows,
            **{key: spread(values) for key, values in obvious.items()},
        },
        "ours_over_obvious": {key: ratios(ours[key], obvious[key]) for key in ours},
    }


class ObviousBuild:
    """The first training rows with candidates and templates drawn, to be formatted and tokenised one by one."""

    def __init__(self, data: Path, tokenizer: str, rows: int) -> None:
        from llara_dist.data.dataset import load_dataset
        from llara_dist.data.drawing import Drawing, draw_rows, draw_templates
        from llara_dist.data.exclusions import touched_items
        from llara_dist.data.prompts import PromptEncoder
        from llara_dist.data.tokenizer import load_tokenizer
        from llara_dist.data.wording import load_templates

        dataset = load_dataset(data)
        if dataset.num_rows["train"] < rows:
            raise SystemExit(f"{data}: {dataset.num_rows['train']} training rows, --build_rows asks for {rows}")
        self.encoder = PromptEncoder(load_tokenizer(tokenizer), dataset.titles, load_templates(dataset.domain))
        touched = touched_items(*dataset.interactions, dataset.num_items)
        self.rows = dataset.train.chunk(0, rows)
        drawing = Drawing(self.encoder.table(dataset.num_candidates), 0, 1024, *touched)
        _, self.candidates = draw_rows(self.rows, None, drawing, 0)
        self.templates = draw_templates(self.rows.keys, 0, 0, len(self.encoder.templates)).tolist()

    def write(self, folder: Path) -> None:
        """Format, tokenise and write every row."""
        import webdataset

        folder.mkdir()
        with webdataset.ShardWriter(str(folder / "%06d.tar"), verbose=0) as writer:
            for row, (key, target) in enumerate(zip(self.rows.keys.tolist(), self.rows.targets.tolist(), strict=True)):
                text = self.encoder.text(self.rows.history(row), self.candidates[row], self.templates[row])
                tokens = self.encoder.whole_ids(text, target)
                writer.write({"__key__": f"00-{key:010d}", "mp": {"key": key, "tokens": tokens.tobytes()}})


if __name__ == "__main__":
    main()
