"""`llara-dist tune` on a GPU: real memory that runs out, and a whole search."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from llara_dist.autotune import command, search
from llara_dist.autotune.measure import ModelBench
from llara_dist.autotune.questions import start_of
from llara_dist.distributed import World
from llara_dist.model.kernels import chooser
from llara_dist.training.preflight.examine import open_inputs
from tests.runs import run_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_after_memory_ran_out_smaller_rows_fit_and_nothing_is_lost(inputs: Path, tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    config = dataclasses.replace(run_config(inputs, tmp_path / "run", global_batch_samples=64), device="cuda")
    bench = ModelBench(config, open_inputs(config, World()), device, ranks=1)
    start = start_of(config, chooser(config.model, device, 0))
    bench.prepare(start)
    small, large = start.of_tokens(bench.longest), start.of_tokens(bench.most_tokens)
    assert bench.fits(small)
    assert bench.fits(large)
    least, most = bench.peak_bytes(small), bench.peak_bytes(large)
    assert least is not None
    assert most is not None
    assert most > least
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    limit = torch.cuda.memory_reserved(device) + (least - before) + (most - least) // 2
    fraction = limit / torch.cuda.get_device_properties(device).total_memory
    tight = start.of_tokens(bench.most_tokens - 1)  # not seen before
    try:
        torch.cuda.set_per_process_memory_fraction(fraction, device)
        assert not bench.fits(tight)
        assert torch.cuda.memory_allocated(device) <= before + (1 << 20)
        assert bench.speed(small) > 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert bench.speed(large) > 0


def test_a_whole_search(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "WINDOW_S", 0.02)
    monkeypatch.setattr(search, "COMPILE_S", 1e9)
    config = dataclasses.replace(run_config(inputs, tmp_path / "tuned.yaml"), device="cuda")
    result = command.tune(config, seconds=40.0)
    refused = [trial for trial in result["trials"] if trial["verdict"].startswith(("failed", "refused"))]
    assert refused == []
    assert all(trial["peak_bytes"] for trial in result["trials"] if trial["tokens_per_s"])
