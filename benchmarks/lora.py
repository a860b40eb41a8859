"""PEFT's LoRA against the fused one: time and bytes kept, of one linear layer and of a whole small Llama's step.

    PYTHONPATH=. python benchmarks/lora.py [--out results.json] [--repeats 15] [--shrink 1]

Both run by turns in one process, forward and backward; a ratio is of their medians. Times are of the clock on a GPU and
of the process on the CPU. On a GPU the layers have the shapes of a Llama 7B and 8192 tokens, on the CPU an eighth of
that width. Kept is what the forward pass leaves for the backward pass, parameters not counted. The results are written
after every case: a run that is broken off leaves those that it measured.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.record import machine
from llara_dist.config import KernelsConfig, LoraConfig, ModelConfig, ProjectorConfig
from llara_dist.integrity import write_json
from llara_dist.model.fused_lora import fuse_lora
from llara_dist.model.hybrid import build_hybrid_llama
from llara_dist.stream.batch import collate
from tests.models import ITEM_DIM, ITEMS, write_shape
from tests.tiny import make_sample

SIZES = {
    "cpu": {"tokens": 4161, "linears": ((512, 512), (512, 1376), (1376, 512))},
    "cuda": {"tokens": 8192, "linears": ((4096, 4096), (4096, 11008), (11008, 4096))},
}
LLAMAS: dict[str, dict[str, int]] = {
    "cpu": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "cuda": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
SAMPLES = {"cpu": 64, "cuda": 140}
KINDS = ("peft", "fused")
DROPOUTS = (0.0, 0.1)

Run = tuple[nn.Module, Callable[[], Tensor]]
"""a module, and its forward pass to a scalar"""


def main() -> None:
    """Measure every case, print a table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--shrink", type=int, default=1, help="divides the tokens and samples, to see that all runs")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = SIZES[device.type]["tokens"] // options.shrink
    result: dict[str, Any] = {
        "what": "benchmarks/lora.py",
        **machine(device.type, torch.get_num_threads()),
        "dtype": str(dtype),
        "tokens_of_linears": tokens,
        "layers_of_the_llama": LLAMAS[device.type]["num_hidden_layers"],
        "cases": [],
    }

    def measure(name: str, runs: dict[str, Run]) -> None:
        result["cases"].append(compare(name, runs, device, options.repeats))
        if options.out:
            write_json(options.out, result)

    print(f"{'case':40} {'PEFT ms':>9} {'fused ms':>9} {'ratio':>6} {'PEFT MB kept':>13} {'fused MB kept':>14}")
    for bits in (4, 16 if device.type == "cuda" else 32):
        for inputs, outputs in SIZES[device.type]["linears"]:
            runs = {kind: linear(kind, (tokens, inputs, outputs), bits, device, dtype) for kind in KINDS}
            for dropout in DROPOUTS:
                arrange(runs, dropout)
                measure(f"linear {inputs} to {outputs}, {bits} bits, p={dropout}", runs)
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), device, dtype)
        runs = {kind: llama(kind, folder, device, SAMPLES[device.type] // options.shrink) for kind in KINDS}
    for dropout in DROPOUTS:
        for recompute in (False, True):
            arrange(runs, dropout, recompute)
            measure(f"Llama step, 4 bits, p={dropout}" + (", recomputed" if recompute else ""), runs)


def linear(kind: str, sizes: tuple[int, int, int], bits: int, device: torch.device, dtype: torch.dtype) -> Run:
    """One adapted linear layer (tokens, inputs, outputs), and its forward pass to a sum with a fixed gradient."""
    import bitsandbytes
    import peft

    tokens, inputs, outputs = sizes

    torch.manual_seed(0)
    whole = nn.Linear(inputs, outputs, bias=False, dtype=dtype, device=device)
    base: nn.Module = whole
    if bits == 4:
        base = bitsandbytes.nn.Linear4bit(
            inputs, outputs, bias=False, compute_dtype=dtype, quant_type="nf4", device=device
        )
        base.load_state_dict(whole.state_dict())
    holder: Any = nn.ModuleDict({"linear": base.to(device).requires_grad_(False)})
    holder.is_loaded_in_4bit = bits == 4
    settings = peft.LoraConfig(r=8, lora_alpha=32, lora_dropout=max(DROPOUTS), target_modules=["linear"])
    holder = peft.inject_adapter_in_model(settings, holder).to(device).train()
    for matrices in (holder["linear"].lora_A, holder["linear"].lora_B):
        matrices.to(torch.float32)  # as in a run, whatever the layer's weights are
    if kind == "fused":
        fuse_lora(holder)
    x = torch.randn(1, tokens, inputs, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(1, tokens, outputs, device=device, dtype=dtype)

    def forward() -> Tensor:
        x.grad = None
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return (holder["linear"](x) * gradient).sum()

    return holder, forward


def write_llama(folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """A random Llama made on the device and stored in the type it computes in: at a 7B's width both save minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            write_shape(folder, max_position_embeddings=8192, **LLAMAS[device.type])
    finally:
        torch.set_default_dtype(before)


def llama(kind: Any, folder: str, device: torch.device, num_samples: int) -> Run:
    """A whole HybridLlama with NF4 weights on one packed row."""
    table = torch.randn(ITEMS, ITEM_DIM, generator=torch.Generator().manual_seed(0))
    model = build_hybrid_llama(
        ModelConfig(path=folder, bits=4, activation_checkpointing=True),
        LoraConfig(dropout=max(DROPOUTS)),
        ProjectorConfig(),
        table,
        device,
        seed=0,
        kernels=KernelsConfig(lora=kind),
    ).train()
    samples = [make_sample(key, num_items=ITEMS) for key in range(num_samples)]
    batch = collate(samples, [True] * len(samples)).to(device)
    return model, lambda: model(batch)


def arrange(runs: dict[str, Run], dropout: float, recompute: bool = False) -> None:
    """Another dropout in the same modules, and whether layers are recomputed: nothing is loaded and quantised twice."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for model, _ in runs.values():
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            elif isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = recompute


def compare(name: str, runs: dict[str, Run], device: torch.device, repeats: int) -> dict[str, Any]:
    """Time of both by turns, bytes kept, and on CUDA the peak beyond what was there."""
    found: dict[str, Any] = {"name": name}
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    for kind, (model, forward) in runs.items():
        found[f"{kind}_kept_bytes"] = kept_bytes(model, forward)
    for _ in range(repeats):
        for kind, (model, forward) in runs.items():
            model.zero_grad(set_to_none=True)
            started = clock(device)
            forward().backward()
            seconds[kind].append(clock(device) - started)
    for kind in runs:
        found[f"{kind}_s"] = statistics.median(seconds[kind])
    found["peft_over_fused"] = round(found["peft_s"] / found["fused_s"], 3)
    print(
        f"{name:40} {1e3 * found['peft_s']:9.2f} {1e3 * found['fused_s']:9.2f} {found['peft_over_fused']:6.2f}"
        f" {found['peft_kept_bytes'] / 1e6:13.1f} {found['fused_kept_bytes'] / 1e6:14.1f}",
        flush=True,
    )
    return found


def clock(device: torch.device) -> float:
    """Seconds: once the GPU has done what it was given; on a CPU that others use as well, of this process alone."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages that a forward pass saves, parameters and buffers not counted; warms up as well."""
    known = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (pointer := tensor.untyped_storage().data_ptr()) not in known:
            kept.setdefault(pointer, tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    result.backward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


if __name__ == "__main__":
    main()
