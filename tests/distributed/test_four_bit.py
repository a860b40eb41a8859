"""ZeRO-3 over packed 4-bit weights: each rank holds its share of the bytes, and a step gathers a quarter of bf16's."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from llara_dist import distributed
from llara_dist.config import ModelConfig, RunConfig
from llara_dist.distributed import World
from llara_dist.model.llama import load_llama
from llara_dist.model.quantize import quantize
from llara_dist.training.metrics_log import read_metrics
from llara_dist.training.preflight.examine import open_inputs
from llara_dist.training.run import open_run
from tests.distributed.ranks import run_ranks
from tests.distributed.training import join, train_all
from tests.runs import run_config

# Everything is partitioned however small, and released as soon as it was used, as in a model that does not fit.
PARTITION_ALL = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}
STEPS = 3  # the last is measured: in the first DeepSpeed learns the order of gathers


def count_gathers(config: RunConfig, world: World, device: torch.device, out: Path) -> None:
    """Train a few steps; write this rank's partitions of the packed weights, and what one step gathered of them."""
    import bitsandbytes
    from deepspeed.runtime.zero import partition_parameters

    run = open_run(config, open_inputs(config, world), world, device)
    layers: dict[str, Any] = {
        name.removeprefix("llm.base_model.model.").removesuffix(".base_layer"): module
        for name, module in run.engine.model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    names = {module.weight.ds_id: name for name, module in layers.items()}
    gathers: Counter[str] = Counter()
    gathered: Counter[str] = Counter()
    moved: list[int] = []
    gather_bytes = partition_parameters._dist_allgather_fn

    def noted_bytes(given: torch.Tensor, whole: torch.Tensor, group: Any = None) -> Any:
        moved.append(whole.nbytes)
        return gather_bytes(given, whole, group)

    def noted(gather: Any) -> Any:
        def call(parameters: Any, *arguments: Any, **named: Any) -> Any:
            wanted = list(parameters)
            moved.clear()
            handle = gather(wanted, *arguments, **named)
            sizes = [p.ds_tensor.numel() * p.ds_tensor.element_size() * world.size for p in wanted]
            assert sum(moved) == sum(sizes), (moved, sizes)  # what the collectives carried is these parameters
            for parameter, size in zip(wanted, sizes, strict=True):
                if parameter.ds_id in names:
                    gathers[names[parameter.ds_id]] += 1
                    gathered[names[parameter.ds_id]] += size
            return handle

        return call

    parameter: Any
    for parameter in run.engine.model.parameters():
        parameter.all_gather_coalesced = noted(parameter.all_gather_coalesced)
    passes = 0
    with mock.patch.object(partition_parameters, "_dist_allgather_fn", noted_bytes):
        for step in run.loader:
            gathers.clear()
            gathered.clear()
            passes = len(step.microbatches)
            run.engine.train_step(step, *run.rates(step.index))
    out.mkdir(parents=True, exist_ok=True)
    weights = [module.weight for module in layers.values()]
    assert {weight.data.numel() for weight in weights} == {0}  # nothing but the partition is left on this rank
    save_file(
        {name: module.weight.ds_tensor.detach().clone() for name, module in layers.items()},
        out / f"rank-{world.rank}.safetensors",
    )
    parameters = {name: module.in_features * module.out_features for name, module in layers.items()}
    found = {"gathers": gathers, "bytes": gathered, "parameters": parameters, "passes": passes}
    (out / f"rank-{world.rank}.json").write_text(json.dumps(found))


def count_all(configs: list[tuple[RunConfig, Path]]) -> None:
    """Every case in one process group."""
    world, device = join()
    for config, out in configs:
        count_gathers(config, world, device, out)
    distributed.shut_down()


CASES: dict[str, dict[str, Any]] = {
    "uint8": {},
    "float32": {"quant_storage": "float32"},
    "recomputed": {"activation_checkpointing": True},
}


def case_config(inputs: Path, folder: Path, case: str) -> RunConfig:
    ds_config = folder / "zero3.json"
    ds_config.write_text(json.dumps(PARTITION_ALL))
    config = run_config(inputs, folder / f"run-{case}", max_steps=STEPS, max_tokens_per_microbatch=300)
    return dataclasses.replace(config, deepspeed=ds_config, model=dataclasses.replace(config.model, **CASES[case]))


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def counted(request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """All cases on some ranks: the number of ranks, and the folder with what they wrote."""
    folder = tmp_path_factory.mktemp("counted")
    cases = [(case_config(inputs, folder, case), folder / case) for case in CASES]
    run_ranks(count_all, request.param, folder / "ranks", cases)
    return request.param, folder


@pytest.mark.parametrize("case", CASES)
def test_the_ranks_partitions_are_the_packed_weights(counted: tuple[int, Path], inputs: Path, case: str) -> None:
    size, folder = counted
    ranks = [load_file(folder / case / f"rank-{rank}.safetensors") for rank in range(size)]
    model = load_llama(ModelConfig(path=str(inputs / "llm"), bits=4, **CASES[case]), torch.device("cpu"))
    assert len(ranks[0]) == 14
    for name in ranks[0]:
        whole = model.get_parameter(f"{name}.weight").detach().flatten()
        shares = [rank[name] for rank in ranks]
        assert [share.numel() for share in shares] == size * [whole.numel() // size]
        assert torch.equal(torch.cat(shares).view(torch.uint8), whole.view(torch.uint8))


@pytest.mark.parametrize("case", CASES)
def test_a_step_gathers_at_most_thirty_percent_of_bf16(counted: tuple[int, Path], case: str) -> None:
    size, folder = counted
    ranks = [json.loads((folder / case / f"rank-{rank}.json").read_text()) for rank in range(size)]
    assert all(rank == ranks[0] for rank in ranks)
    found = ranks[0]
    assert found["passes"] > 1
    in_bf16 = {name: 2 * found["parameters"][name] * times for name, times in found["gathers"].items()}
    ratio = sum(found["bytes"].values()) / sum(in_bf16.values())
    each = set(found["gathers"].values())
    print(
        f"{size} ranks, {case}: {found['passes']} micro-batches, each layer gathered {sorted(each)} times, "
        f"{sum(found['bytes'].values()):,} bytes; in bf16 {sum(in_bf16.values()):,}: {ratio:.3f}"
    )
    assert found["gathers"].keys() == found["parameters"].keys()
    assert ratio <= 0.30
    # Forward and backward of each micro-batch; with activation checkpointing the recomputed forward as well.
    assert each == {(3 if case == "recomputed" else 2) * found["passes"]}


def test_a_stored_quantised_model_trains_as_one_quantised_at_load(inputs: Path, tmp_path: Path) -> None:
    quantize(str(inputs / "llm"), tmp_path / "nf4")
    config = run_config(inputs, tmp_path / "loaded", max_steps=6)
    stored = dataclasses.replace(
        config, out=tmp_path / "stored", model=dataclasses.replace(config.model, path=str(tmp_path / "nf4"))
    )
    run_ranks(train_all, 1, tmp_path / "ranks", [config, stored])
    losses = [[row["loss"] for row in read_metrics(run.out / "metrics.jsonl")] for run in (config, stored)]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
