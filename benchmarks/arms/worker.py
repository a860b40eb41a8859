"""One arm's process: `python -m benchmarks.arms.worker ARM SETUP`, SETUP as `Setup.write` made it."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.arms.setup import LONGEST_SAMPLE, Setup
from benchmarks.arms.turns import Stopped, Turns

MATRIX = "matrix product"
OURS = "ours"
PUBLISHED = "published method"
TRAINER = "HF Trainer"
GROUPED = "HF Trainer, grouped by length"
SFT = "TRL, padding-free"
UNSLOTH = "Unsloth"
LLAMA_FACTORY = "LLaMA-Factory"
PEERS = (SFT, UNSLOTH, LLAMA_FACTORY)


def main() -> None:
    """Run an arm until it is told to stop; say why where it cannot run."""
    name, text = sys.argv[1:]
    setup = Setup.read(text)
    turns = Turns(setup.device)
    if name == UNSLOTH:  # it wants to be imported before torch's and transformers' users, and patches them
        import importlib.util

        if importlib.util.find_spec("unsloth") is not None:
            import unsloth  # noqa: F401  # pyright: ignore[reportMissingImports]
    torch.set_num_threads(setup.threads)
    try:
        _fitting(lambda rows, recompute: _arm(name, setup, turns, rows, recompute), setup.rows)
    except Stopped:
        pass
    except Exception as error:  # whatever a peer does, the others are measured
        import traceback

        traceback.print_exc()
        lines = str(error).strip().splitlines()
        turns.failed(f"{type(error).__name__}: {lines[0] if lines else ''}"[:200])
    sys.stdout.flush()
    os._exit(0)  # peers leave threads behind that would keep the process


def _fitting(arm: Callable[[int, bool], None], rows: int) -> None:
    """Run with fewer rows in a micro-batch, at last with activations recomputed, until the device's memory holds it."""
    recompute = False
    while True:
        try:
            return arm(rows, recompute)
        except torch.OutOfMemoryError:
            if rows == 1 and recompute:
                raise
        rows, recompute = (rows // 2, recompute) if rows > 1 else (rows, True)
        gc.collect()
        torch.cuda.empty_cache()


def _arm(name: str, setup: Setup, turns: Turns, rows: int, recompute: bool) -> None:
    if name == MATRIX:
        return matrix_product(setup, turns)
    if name.startswith(OURS):
        from benchmarks.arms import ours
        from llara_dist.config import KernelsConfig

        changed = dict([name.removeprefix(OURS).strip(", ").split("=")]) if "=" in name else {}
        fitting = dataclasses.replace(setup, budget=max(setup.budget * rows // setup.rows, LONGEST_SAMPLE))
        return ours.run(fitting, turns, f"{name} {rows}", KernelsConfig(**changed), recompute)  # pyright: ignore[reportArgumentType]
    if name == PUBLISHED:
        from benchmarks.arms import published

        return published.run(setup, turns, rows)
    from benchmarks.arms import trainers

    if name in (TRAINER, GROUPED):
        return trainers.run_trainer(setup, turns, rows, grouped=name == GROUPED, recompute=recompute)
    if name == LLAMA_FACTORY:
        return trainers.run_llama_factory(setup, turns, rows)
    return {SFT: trainers.run_sft, UNSLOTH: trainers.run_unsloth}[name](setup, turns, rows)


def matrix_product(setup: Setup, turns: Turns) -> None:
    """The rate of a large square matrix product, the limit that steps are measured against: the best of a few runs."""
    size, products = (8192, 50) if setup.device == "cuda" else (2048, 1)
    left, right = (torch.randn(size, size, device=setup.torch_device, dtype=setup.dtype) for _ in range(2))
    turns.ready(size=size, dtype=str(setup.dtype).removeprefix("torch."))

    def seconds() -> float:
        started = time.perf_counter()
        for _ in range(products):
            torch.mm(left, right)
        if setup.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / products

    while True:
        turns.begin()
        best = min(seconds() for _ in range(5))
        turns.end(flops_per_second=2 * size**3 / best)


if __name__ == "__main__":
    main()
