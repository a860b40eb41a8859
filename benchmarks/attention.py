"""Attention over a packed row, backend by backend, and a step with a whole last layer or only the answers' rows.

    PYTHONPATH=. python benchmarks/attention.py [--tokens 4000] [--device cpu] [--repeats 7] [--out FILE]

Samples of 150 to 330 tokens with answers of 8, as MovieLens' are with Llama-2's tokenizer. The settings take turns in
one process, so that what else the machine does strikes them alike; the first turn is not counted, the median of the
others is. On the CPU the process's CPU seconds, on a GPU wall time between synchronisations. `padded` gathers the
samples into an [N, longest] block and scatters the result back: what packing without a kernel for it has to do.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.arms.inputs import SHAPES
from benchmarks.record import machine
from llara_dist.config import LoraConfig, ModelConfig, ProjectorConfig
from llara_dist.data.samples import Sample
from llara_dist.integrity import json_text, write_json
from llara_dist.model.attention_backends import attend, obstacle
from llara_dist.model.hybrid import build_hybrid_llama
from llara_dist.model.packing import Packing
from llara_dist.stream.batch import Batch, collate
from tests.models import write_shape

ANSWER, SLOTS, ITEMS, ITEM_DIM = 8, 30, 1682, 64
SHAPE = {**SHAPES["small"], "num_key_value_heads": SHAPES["small"]["num_attention_heads"]}
HEADS, HEAD_DIM = 8, 64


def row(tokens: int) -> Batch:
    """A packed row of at least so many tokens."""
    random, samples, total = np.random.default_rng(0), [], 0
    while total < tokens:
        length = int(random.integers(150, 331))
        slots = np.sort(random.choice(np.arange(5, length - ANSWER - 5), SLOTS, replace=False)).astype(np.int32)
        samples.append(
            Sample(
                key=len(samples),
                pass_index=0,
                tokens=random.integers(2, SHAPE["vocab_size"], length).astype(np.uint32),
                slot_positions=slots,
                slot_items=random.integers(0, ITEMS, SLOTS).astype(np.int32),
                title_starts=slots - 1,
                title_lengths=np.ones(SLOTS, np.int32),
                num_history=10,
                target_index=0,
                answer_start=length - ANSWER,
                answer_end=length,
            )
        )
        total += length
    return collate(samples, [True] * len(samples))


def padded(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """The same attention in an [N, longest] block."""
    longest, boundaries = packing.keys.longest, packing.keys.boundaries.to(torch.int64)
    starts, lengths = boundaries[:-1], boundaries.diff()
    columns = torch.arange(longest, device=query.device)
    cells = torch.where(columns < lengths[:, None], starts[:, None] + columns, 0)
    positions = torch.arange(query.shape[0], device=query.device)
    sample = torch.searchsorted(boundaries, positions, right=True) - 1
    q, k, v = (states[cells].transpose(1, 2) for states in (query, key, value))
    block = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return block.transpose(1, 2).flatten(0, 1)[sample * longest + positions - starts[sample]]


def seconds(device: torch.device) -> float:
    """A clock that other work on the machine's cores does not move."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def measure(settings: dict[str, Callable[[], Tensor]], repeats: int, device: torch.device) -> dict[str, Any]:
    """Median seconds of forward and backward passes, the settings in turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
    for _ in range(repeats + 1):
        for name, forward in settings.items():
            start = seconds(device)
            result = forward()
            middle = seconds(device)
            result.backward()
            times[name].append((middle - start, seconds(device) - middle))
    found: dict[str, Any] = {}
    for name, pairs in times.items():
        forward_s, backward_s = (statistics.median(part) for part in zip(*pairs[1:], strict=True))
        found[name] = {"forward_s": forward_s, "backward_s": backward_s, "total_s": forward_s + backward_s}
        print(
            f"  {name:12} forward {forward_s:.4f} s, backward {backward_s:.4f} s, both {forward_s + backward_s:.4f} s"
        )
    return found


def attention(batch: Batch, device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Every backend that runs here, on random states of the row's shape."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch.num_tokens, HEADS, HEAD_DIM, generator=generator).to(device, dtype).requires_grad_()
        for _ in range(3)
    )
    settings: dict[str, Callable[[], Tensor]] = {"padded": lambda: padded(q, k, v, Packing.of(batch, "sdpa")).sum()}
    for backend in ("sdpa", "varlen", "flash2", "flash3"):
        if not obstacle(backend, device, dtype, HEAD_DIM):
            settings[backend] = lambda backend=backend: attend(q, k, v, Packing.of(batch, backend)).sum()
    print(f"attention, {batch.num_tokens} tokens, {batch.num_samples} samples, {HEADS} heads of {HEAD_DIM}, {dtype}:")
    return measure(settings, repeats, device)


def last_layer(batch: Batch, device: torch.device, repeats: int) -> dict[str, Any]:
    """Forward and backward pass of a small NF4 model with LoRA."""
    with tempfile.TemporaryDirectory() as folder:
        write_shape(Path(folder), **SHAPE)
        table = torch.randn(ITEMS, ITEM_DIM, generator=torch.Generator().manual_seed(0))
        config = ModelConfig(path=folder, bits=4)
        model = build_hybrid_llama(config, LoraConfig(), ProjectorConfig(), table, device, seed=0).train()

    def forward(rows: Any) -> Tensor:
        model.zero_grad()
        model.kernels = dataclasses.replace(model.kernels, last_layer=rows)
        return model(batch)

    print(f"step of a model with {SHAPE['num_hidden_layers']} layers of {SHAPE['hidden_size']}, last layer:")
    return measure({rows: (lambda rows=rows: forward(rows)) for rows in ("all", "answers")}, repeats, device)


def main() -> None:
    """Measure, print, and write what `--out` names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batch = row(arguments.tokens).to(device)
    found: dict[str, Any] = {
        "what": "benchmarks/attention.py",
        **machine(device.type, torch.get_num_threads()),
        "tokens": batch.num_tokens,
        "samples": batch.num_samples,
        "padding": batch.num_samples * batch.max_seqlen / batch.num_tokens,
    }
    parts = {
        "attention": lambda: attention(batch, device, dtype, arguments.repeats),
        "last_layer": lambda: last_layer(batch, device, arguments.repeats),
    }
    for name, part in parts.items():
        found[name] = part()
        if arguments.out:
            write_json(arguments.out, found)
    if not arguments.out:
        print(json_text(found), end="")


if __name__ == "__main__":
    main()
