"""The projector in a packed row: the fused op against eager PyTorch and torch.compile, and the hardware's limit.

    PYTHONPATH=. python benchmarks/projector.py [--out RESULT.json]    on a GPU
    PYTHONPATH=. python benchmarks/projector.py --device cpu           eager, compiled, and every slot projected
    PYTHONPATH=. python benchmarks/projector.py --compile_only         registers, spills, shared memory; needs no GPU

Shapes of a 7B model: d = 64, m = h = 4096, T = 8192, S = 900 slots that hold U distinct items, bfloat16 autocast over
float32 weights. The arms take turns within a round, the order turns from round to round; a ratio is the median of the
rounds' ratios. On a GPU a call is timed by CUDA events, after a write to 256 MiB that empties the cache, since a whole
model runs between two calls in training. On a CPU the computation is float32, the row shorter, and the op is the eager
reference itself; the kernels are not measured there. CPU seconds of the process count: other work on the cores does
not.

The floor is what any implementation must move and multiply. Forward: the weights read in float32 and the slots written;
backward: the weights and the slots' gradient read, the weights' gradients written; both: the products of the distinct
items. Its time is, per pass, the larger of bytes ÷ bandwidth and FLOPs ÷ matrix rate, both measured in the same run.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import machine
from llara_dist.cost.architecture import PRESETS
from llara_dist.cost.flops import step_flops
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import SampleSizes, Work
from llara_dist.integrity import json_text, write_json
from llara_dist.model.ops.projector import project_reference, write_behaviour_, write_reference

ITEM_DIM, WIDTH = 64, 4096
"""d, and m = h"""
TABLE = 16384
"""rows of the item table"""


@dataclass(frozen=True)
class Row:
    """One row's tensors; `weights` are w1, b1, w2, b2."""

    embeddings: Tensor
    item_table: Tensor
    unique_items: Tensor
    item_slots: Tensor
    item_offsets: Tensor
    slot_inverse: Tensor
    gradient: Tensor
    weights: tuple[Tensor, ...]
    compute: torch.dtype


def main() -> None:
    """Measure or compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--items", type=int, nargs="+", default=[32, 128, 512, 1024], help="U")
    parser.add_argument(
        "--slots", type=int, default=900, help="S; a row with more items than that has one slot an item"
    )
    parser.add_argument("--tokens", type=int, help="T; default 8192, on a CPU 2048")
    parser.add_argument("--width", type=int, default=WIDTH, help="m = h")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile_only", action="store_true", help="compile the kernels for sm_80 and sm_90")
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90], help="with --compile_only")
    parser.add_argument("--compute", nargs="+", default=["bfloat16", "float32"], help="with --compile_only")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.compile_only and options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --device cpu or --compile_only")
    device = "cuda" if options.device == "cuda" and torch.cuda.is_available() else "cpu"
    ran_on = machine(device, torch.get_num_threads(), ("torch", "triton"))
    result: dict[str, Any] = {"what": "benchmarks/projector.py", **ran_on}
    for found in [compile_kernels(options.targets, options.compute)] if options.compile_only else measure(options):
        result |= found
        if options.out:
            write_json(options.out, result)
    print_table(result["kernels" if options.compile_only else "table"])
    if not options.out:
        print(json_text(result), end="")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Columns as wide as their longest cell."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


# Measuring


def make_row(items: int, slots: int, tokens: int, width: int, device: str) -> Row:
    """A row in which each item stands at least once; bfloat16 on a GPU, float32 on a CPU."""
    generator = torch.Generator().manual_seed(items)
    compute = torch.bfloat16 if device == "cuda" else torch.float32
    slots = max(items, slots)
    inverse = torch.cat([torch.arange(items), torch.randint(items, (slots - items,), generator=generator)])
    uses = torch.bincount(inverse, minlength=items)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), uses.cumsum(0)])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    weights = (normal(width, ITEM_DIM) / 8, normal(width), normal(width, width) / width**0.5, normal(width))
    return Row(
        embeddings=normal(tokens, width).to(compute),
        item_table=normal(TABLE, ITEM_DIM),
        unique_items=torch.randperm(TABLE, generator=generator)[:items].sort().values.to(device),
        item_slots=torch.randperm(tokens, generator=generator)[:slots].to(device),
        item_offsets=offsets.to(device, torch.int32),
        slot_inverse=inverse.sort().values.to(device),
        gradient=normal(tokens, width).to(compute),
        weights=tuple(weight.requires_grad_() for weight in weights),
        compute=compute,
    )


def autocast(row: Row) -> Any:
    """As in training: a GPU multiplies in bfloat16."""
    return torch.autocast(row.embeddings.device.type, torch.bfloat16, enabled=row.compute == torch.bfloat16)


def fused(row: Row) -> Tensor:
    """The op, in place."""
    between = (row.item_table, row.unique_items, row.item_slots, row.item_offsets)
    with autocast(row):
        return write_behaviour_(row.embeddings.detach(), *between, *row.weights)


def eager(row: Row) -> Tensor:
    """PyTorch's ops one after the other; distinct items once."""
    with autocast(row):
        behaviour = project_reference(row.item_table[row.unique_items], *row.weights)
        return write_reference(row.embeddings.detach(), behaviour, row.item_slots, row.slot_inverse)


def at_slots(item_table: Tensor, unique_items: Tensor, slot_inverse: Tensor, *weights: Tensor) -> Tensor:
    """Of each slot its behaviour embedding, for torch.compile: a row written to inside would lose its gradient."""
    return project_reference(item_table[unique_items], *weights)[slot_inverse]


def compiled(row: Row) -> Tensor:
    """`eager` with all but the last write by torch.compile."""
    with autocast(row):
        behaviour = _compiled_at_slots()(row.item_table, row.unique_items, row.slot_inverse, *row.weights)
    return row.embeddings.detach().index_copy_(0, row.item_slots, behaviour.to(row.compute))


@cache
def _compiled_at_slots() -> Any:
    return torch.compile(at_slots, dynamic=True)


def eager_every_slot(row: Row) -> Tensor:
    """PyTorch's ops on each slot's item, repeated or not."""
    with autocast(row):
        behaviour = project_reference(row.item_table[row.unique_items[row.slot_inverse]], *row.weights)
        return row.embeddings.detach().index_copy_(0, row.item_slots, behaviour.to(row.compute))


def both(forward: Callable[[Row], Tensor]) -> Callable[[Row], Any]:
    """Forward and backward."""
    return lambda row: torch.autograd.grad(forward(row), row.weights, row.gradient)


def seconds(call: Callable[[], Any], flush: Tensor | None) -> float:
    """One call: on a GPU between two events, the cache emptied by writing `flush`; on a CPU, CPU seconds."""
    if flush is None:
        begun = time.process_time()
        call()
        return time.process_time() - begun
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def measure(options: Any) -> Iterator[dict[str, Any]]:
    """All arms at every number of items, beside the floor; yields what is known after each number of items and pass."""
    on_gpu = options.device == "cuda"
    tokens = options.tokens or (8192 if on_gpu else 2048)
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda") if on_gpu else None
    peaks = measure_peaks(options.device, flush)
    arms: dict[str, Callable[[Row], Tensor]] = {"eager": eager, "compiled": compiled}
    arms |= {"fused": fused} if on_gpu else {"eager, every slot": eager_every_slot}
    table: list[dict[str, Any]] = []
    described = {
        "note": "" if on_gpu else "no GPU took part: the fused kernels are not measured, the eager reference is",
        "shape": {"d": ITEM_DIM, "m": options.width, "h": options.width, "T": tokens},
        "compute": "bfloat16" if on_gpu else "float32",
        "rounds": options.rounds,
        "measured_peaks": peaks,
        "share_of_a_step": step_share(options.items, options.slots, 8192),
    }
    for items in options.items:
        row = make_row(items, options.slots, tokens, options.width, options.device)
        floors = floor(row, peaks)
        for name, limit in (("forward", floors["forward"]), ("forward and backward", sum(floors.values()))):
            calls = {
                arm: partial(function if name == "forward" else both(function), row) for arm, function in arms.items()
            }
            for arm, values in take_turns(calls, options.rounds, flush).items():
                median = statistics.median(values["own"])
                table.append(
                    {"U": items, "S": len(row.item_slots), "pass": name, "arm": arm, "µs": round(median * 1e6, 1)}
                    | {"min µs": round(min(values["own"]) * 1e6, 1), "floor µs": round(limit * 1e6, 1)}
                    | {"over floor": round(median / limit, 2)}
                    | {"eager over this": round(statistics.median(values["eager over"]), 3)}
                )
            yield {**described, "table": table}


def take_turns(
    calls: dict[str, Callable[[], Any]], rounds: int, flush: Tensor | None
) -> dict[str, dict[str, list[float]]]:
    """By arm its seconds, and in the same round eager's over them; two calls of each go before, to compile and load."""
    order, times = list(calls), {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    for turn in range(rounds):
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            times[name].append(seconds(calls[name], flush))
    return {
        name: {"own": own, "eager over": [e / mine for e, mine in zip(times["eager"], own, strict=True)]}
        for name, own in times.items()
    }


def measure_peaks(device: str, flush: Tensor | None) -> dict[str, float]:
    """Bytes/s of a large copy (read + written) and FLOP/s of a large square product, best of ten."""
    on_gpu = device == "cuda"
    source = torch.ones(2**28 if on_gpu else 2**25, device=device)
    target = torch.empty_like(source)
    size = 8192 if on_gpu else 1024
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    copy = min(seconds(lambda: target.copy_(source), flush) for _ in range(10))
    product = min(seconds(lambda: square @ square, flush) for _ in range(10))
    return {"bytes_per_second": 2 * 4 * source.numel() / copy, "flops_per_second": 2 * size**3 / product}


def floor(row: Row, peaks: dict[str, float]) -> dict[str, float]:
    """Least seconds of each pass."""
    items, slots, width = len(row.unique_items), len(row.item_slots), row.embeddings.shape[1]
    weights = sum(weight.numel() for weight in row.weights) * 4
    at_slots = slots * width * row.embeddings.element_size()
    first, second = ITEM_DIM * width, width * width
    traffic = {"forward": weights + at_slots, "backward": 2 * weights + at_slots}
    flops = {"forward": 2 * items * (first + second), "backward": items * (2 * first + 4 * second)}
    return {
        name: max(traffic[name] / peaks["bytes_per_second"], flops[name] / peaks["flops_per_second"])
        for name in traffic
    }


def step_share(items: list[int], slots: int, tokens: int) -> dict[str, Any]:
    """The projector's part of a micro-batch's FLOPs on Llama-2-7B with LoRA r = 8; computed, not measured."""
    sizes = SampleSizes().row(tokens, TABLE)
    shares = {}
    for each in items:
        work = Work(**{**vars(sizes), "items": each, "slots": max(each, slots)})
        flops = step_flops(TunedModel(PRESETS["llama-2-7b"]), work)
        shares[str(each)] = flops.projector / flops.model
    return {"computed": "cost.flops, Llama-2-7B, LoRA r = 8", "by_items": shares}


# Compiling without a GPU

POINTERS = {"unique_items": "*i64", "item_slots": "*i64", "item_offsets": "*i32"}
WEIGHTS = ("item_table", "w1", "b1", "w2", "b2")
MULTIPLES_OF_16 = ("num_hidden", "item_dim", "width", "row_stride", "gradient_stride")
"""sizes at 7B shapes that Triton then knows to be multiples of 16"""


def compile_kernels(targets: list[int], computes: list[str]) -> dict[str, Any]:
    """Every kernel in every tiling that the launcher chooses, and what ptxas made of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llara_dist.model.ops import projector_kernels as kernels

    found = []
    for target in targets:
        for compute in computes:
            for items in (16, 32, 64, 128) if compute == "bfloat16" else (16, 32, 64):
                launches = kernels.Launches.of(items, getattr(torch, compute))
                # The sum over slots has one tiling.
                for name in ("hidden", "output", "hidden_backward", *(["slot_sum"] if items == 16 else [])):
                    kernel = getattr(kernels, f"{name}_kernel")
                    constants = dict(getattr(launches, name))
                    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
                    element = {"bfloat16": "bf16", "float32": "fp32"}[compute]
                    types = {each: argument_type(each, element) for each in kernel.arg_names}
                    aligned = {
                        (place,): [["tt.divisibility", 16]]
                        for place, (each, kind) in enumerate(types.items())
                        if each not in constants and (kind.startswith("*") or each in MULTIPLES_OF_16)
                    }
                    signature = {each: "constexpr" if each in constants else kind for each, kind in types.items()}
                    source = ASTSource(kernel, signature, constants, aligned)
                    built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
                    found.append(
                        {"target": f"sm_{target}", "compute": compute, "U tile": items, "kernel": name}
                        | {"warps": options["num_warps"], **resources(built)}
                    )
    return {"kernels": found}


def argument_type(name: str, element: str) -> str:
    """Triton's name of an argument's type; activations and the row are `element`."""
    if name in POINTERS:
        return POINTERS[name]
    if name in WEIGHTS:
        return "*fp32"
    return "i32" if name == "num_items" or name in MULTIPLES_OF_16 else f"*{element}"


def resources(built: Any) -> dict[str, int]:
    """Registers a thread, bytes spilled to the stack, bytes of shared memory, from the binary."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = str(triton.knobs.nvidia.cuobjdump.path)
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if numbers is None:
        raise SystemExit(f"cuobjdump said no registers: {done.stdout}")
    return {"registers": int(numbers[1]), "spilled": int(numbers[2]), "shared": built.metadata.shared}


if __name__ == "__main__":
    main()
