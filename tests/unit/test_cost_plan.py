"""`llara-dist plan`: predictions move the right way, the recommendation fits, bad input is told in one line."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from llara_dist.cli import main
from llara_dist.config import ModelConfig, RunConfig, to_dict
from llara_dist.cost.architecture import PRESETS
from llara_dist.cost.collectives import Traffic
from llara_dist.cost.command import plan
from llara_dist.cost.hardware import GPUS, find_gpu, measure_cpu, peak_flops
from llara_dist.cost.memory import run_memory
from llara_dist.cost.predict import Cluster, Efficiency, StepTime, communication_seconds, predict_step
from llara_dist.cost.recommend import MARGIN, WORTH, recommend
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import SampleSizes
from llara_dist.cost.zero import ZeroSettings
from llara_dist.ds_config import read_ds_config
from llara_dist.errors import InputError
from llara_dist.model.llama import compute_dtype
from tests.models import write_shape
from tests.runs import ROOT

STAGES = {stage: ZeroSettings.of(read_ds_config(ROOT / "ds_configs" / f"zero{stage}.json")) for stage in range(4)}


def tuned(name: str) -> TunedModel:
    return TunedModel(PRESETS[name], projector_hidden=PRESETS[name].hidden)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_a_device_is_known_by_what_its_driver_says(said: str, name: str) -> None:
    assert peak_flops(said) == GPUS[name].flops


def test_no_utilisation_is_made_up_for_an_unknown_device() -> None:
    assert peak_flops("NVIDIA L40") is None
    assert peak_flops("AMD Instinct MI300X") is None


@pytest.mark.parametrize(
    "said",
    [
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA GB200",
        "NVIDIA GH200 480GB",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
    ],
)
def test_a_variant_with_another_data_sheet_is_not_taken_for_the_one_in_the_table(said: str) -> None:
    assert peak_flops(said) is None


def test_float32_products_are_not_counted_at_the_tensor_cores_peak() -> None:
    def step(bfloat16: bool) -> StepTime:
        model = dataclasses.replace(tuned("llama-2-7b"), bfloat16=bfloat16)
        return predict_step(model, STAGES[0], Cluster(GPUS["h100"], 1), SampleSizes(), 128, 4096)

    assert step(False).products == pytest.approx(989 / 67 * step(True).products)
    assert step(False).peak == 67e12


@pytest.mark.parametrize(("bits", "dtype"), [(4, "auto"), (4, "float32"), (16, "auto"), (32, "auto"), (32, "bfloat16")])
def test_plan_multiplies_in_what_the_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: Literal[4, 16, 32], dtype: Literal["auto", "float32"]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    told = ModelConfig(bits=bits, compute_dtype=dtype)
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {{bits: {bits}, compute_dtype: {dtype}}}\ndeepspeed: ds_configs/zero1.json\n")
    step = plan(gpus=1, run=run, tokens_per_microbatch=4096)["predictions"][0]["step_parts_s"]
    runs_in_bfloat16 = compute_dtype(told, torch.device("cuda")) == torch.bfloat16
    model = dataclasses.replace(tuned("llama-2-7b"), bits=bits, bfloat16=runs_in_bfloat16)
    expected = predict_step(model, STAGES[1], Cluster(GPUS["h100"], 1), SampleSizes(longest=322), 128, 4096)
    assert step["products"] == pytest.approx(expected.products)


def test_ring_bytes() -> None:
    traffic = Traffic()
    traffic.add("all_reduce", 1000)
    traffic.add("all_gather", 400)
    assert traffic.sent(1) == 0
    assert traffic.sent(4) == 2 * 750 + 300


def test_communication_is_latency_and_bytes_over_the_slower_link() -> None:
    inside, across = Cluster(GPUS["h100"], 8), Cluster(GPUS["h100"], 16)
    full = Efficiency(links=1.0)
    assert communication_seconds(Cluster(GPUS["h100"], 1), 1e9, 5, full) == 0
    assert communication_seconds(inside, 450e9, 0, full) == pytest.approx(1.0)
    assert communication_seconds(across, 400e9, 0, full) == pytest.approx(1.0)
    assert communication_seconds(across, 0, 5, full) > communication_seconds(inside, 0, 5, full) > 0


def test_more_work_takes_longer_and_more_ranks_are_faster() -> None:
    model, samples = tuned("llama-2-7b"), SampleSizes()

    def seconds(name: str = "llama-2-7b", ranks: int = 8, batch: int = 512, **changes: Any) -> float:
        cluster = Cluster(GPUS["h100"], ranks)
        held = dataclasses.replace(tuned(name), **changes)
        return predict_step(held, STAGES[1], cluster, samples, batch, 4096).seconds

    assert seconds(batch=1024) > 1.8 * seconds()
    assert seconds(recompute=True) > 1.25 * seconds()
    assert seconds("llama-2-70b") > 8 * seconds()
    assert seconds(ranks=16) < 0.6 * seconds()
    zero3 = predict_step(model, STAGES[3], Cluster(GPUS["h100"], 8), samples, 512, 4096)
    zero1 = predict_step(model, STAGES[1], Cluster(GPUS["h100"], 8), samples, 512, 4096)
    assert zero3.sent_bytes > 10 * zero1.sent_bytes
    assert 0 < zero3.mfu < zero1.mfu < 1


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("ranks", [1, 8, 64, 1024])
def test_what_is_recommended_fits(name: str, ranks: int) -> None:
    cluster = Cluster(GPUS["h100"], ranks)
    found = recommend(tuned(name), cluster, SampleSizes(), max(128, ranks), STAGES)
    assert found is not None
    assert found.memory.device_bytes <= (1 - MARGIN) * cluster.hardware.memory_bytes
    # Where weights leave little room, a partitioned optimizer spares enough recomputation to pay for itself.
    assert found.stage == 0 or name.endswith("70b")
    assert found.tokens_per_microbatch >= SampleSizes().longest
    assert found.reasons


def test_a_small_gpu_recomputes_and_a_too_small_one_is_refused() -> None:
    gpu = dataclasses.replace(GPUS["rtx-4090"], memory_bytes=16 * 2**30)
    small = recommend(tuned("llama-2-13b"), Cluster(gpu, 8), SampleSizes(), 128, STAGES)
    assert small is not None
    assert small.recompute
    assert recommend(tuned("llama-2-70b"), Cluster(GPUS["rtx-4090"], 1024), SampleSizes(), 1024, STAGES) is None


def test_more_layers_than_must_be_are_recomputed_where_that_costs_no_speed() -> None:
    """With room for 30 of 32, 31 need less memory and are not slower by 5 %; all 32 would need more again."""
    model, samples = tuned("llama-2-7b"), SampleSizes()
    row = samples.largest_row(4096, 128, model.items)

    def found(recompute: int) -> int:
        held = run_memory(dataclasses.replace(model, recompute=recompute), row, ZeroSettings(), 1)
        gpu = dataclasses.replace(GPUS["h100"], memory_bytes=math.ceil(held.device_bytes / (1 - MARGIN)))
        best = recommend(model, Cluster(gpu, 1), samples, 128, STAGES, [4096])
        assert best is not None
        return best.recompute

    assert [found(recompute) for recompute in (30, 0)] == [31, 0]


def test_the_less_memory_the_higher_the_stage() -> None:
    """A stage is left only where it does not fit; from 8.6 GiB on a higher one has room for a larger micro-batch."""
    stages = []
    for tenths in range(56, 86):
        gpu = dataclasses.replace(GPUS["h100"], memory_bytes=tenths * 2**30 // 10)
        found = recommend(tuned("llama-2-7b"), Cluster(gpu, 8), SampleSizes(), 128, STAGES)
        stages.append(4 if found is None else found.stage)
    assert stages == sorted(stages, reverse=True)
    assert len(set(stages) - {4}) >= 3


def test_plan_prints_and_returns_every_count(capsys: pytest.CaptureFixture[str]) -> None:
    run = ROOT / "launch" / "configs" / "movielens.yaml"
    main(["plan", "--gpus", "[1, 8, 1024]", "--run", str(run), "--train-samples", "66126", "--json"])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert [found["gpus"] for found in result["predictions"]] == [1, 8, 1024]
    assert [found["global_batch_samples"] for found in result["predictions"]] == [128, 128, 1024 * (4096 // 230)]
    assert [found["global_batch_enlarged"] for found in result["predictions"]] == [False, False, True]
    assert printed.count("more than the run's global batch") == 1
    assert "not validated on GPUs" in printed
    for found in result["predictions"]:
        predicted = found["recommended"]["predicted"]
        assert f"predicted: {predicted['tokens_per_s']:,.0f} tokens/s" in printed
        assert 0 < predicted["device_bytes"] < GPUS["h100"].memory_bytes
    for found in result["predictions"]:
        parts = sum(found["step_parts_s"].values())
        assert math.isclose(parts, found["step_s"])
        assert found["hours"] == pytest.approx(5 * 66126 / found["global_batch_samples"] * found["step_s"] / 3600)
        assert max(sum(found["device"].values()), found["start_bytes"]) == found["device_bytes"]


def test_plan_states_its_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    plan(formulas=True)
    printed = capsys.readouterr().out
    for part in ("4·H·D forward", "2·c·R·D·H", "4P/W masters", "one all-reduce of 4P bytes", "α–β"):
        assert part in printed


def test_a_model_folder_serves_as_well(tmp_path: Path) -> None:
    write_shape(tmp_path)
    found = plan(model=str(tmp_path), tokens_per_microbatch=1024)
    assert found["parameters"] < 1e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "v100"}, r"--gpu v100: unknown; known are a100-40, a100, "),
        ({"model": "gpt-2"}, r"--model gpt-2: unknown; known are llama-2-7b, "),
        ({"run": Path("missing.yaml")}, r"--run missing\.yaml: .*launch/configs"),
        ({"ds_config": Path("missing.json")}, r"missing\.json: ds_config not found"),
        ({"gpus": [8, 0]}, r"--gpus 0: must be at least 1"),
        ({"tokens_per_microbatch": 100}, r"--tokens_per_microbatch 100: less than the longest sample, 322 tokens"),
        ({"longest_sample": 200}, r"--longest_sample 200: shorter than the mean, 230 tokens"),
        ({"answer_tokens": -1}, r"--answer_tokens -1: must be at least 1"),
        ({"slots": -1}, r"--slots -1: must not be negative"),
        ({"train_samples": -1}, r"--train_samples -1: must not be negative"),
        ({"network_gbit_per_s": -1.0}, r"--network_gbit_per_s -1\.0: must not be negative"),
        ({"gpus": 64, "global_batch": 32}, r"--global_batch 32: fewer samples than 64 GPUs"),
    ],
)
def test_bad_input_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(**changes)


def test_a_run_file_must_hold_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(InputError, match="holds no settings of a run"):
        plan(run=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {rnk: 8}", r"lora.*rnk"),
        ("data: 3", r"data must hold settings, found 3"),
        ("model:\nseed: 1", r"model must hold settings, found None"),
        ("model: {bits: 8}", r"model\.bits.*8"),
        ("data: {epochs: five}", r"data\.epochs.*five"),
        ("lora: {rank: 0}", r"lora\.rank=0: must be at least 1"),
    ],
)
def test_a_wrong_run_file_ends_in_one_line(tmp_path: Path, capsys, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text + "\n")
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--run", str(path)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"--run {re.escape(str(path))}: .*{message}", line)


def test_a_run_file_is_typed_as_the_options_of_train_are(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {lora_lr: 8e-4}\ndeepspeed: ds_configs/zero1.json\n")
    assert plan(run=path)["stage"] == 1
    path.with_suffix(".json").write_text(json.dumps(to_dict(RunConfig())))
    assert plan(run=path.with_suffix(".json"))["stage"] == 0


@pytest.mark.parametrize(
    ("zero", "key"),
    [
        ({"stage": 1, "reduce_bucket_size": "big"}, "reduce_bucket_size='big'"),
        ({"stage": 1, "reduce_bucket_size": -1}, "reduce_bucket_size=-1"),
        ({"stage": 1, "contiguous_gradients": 3}, "contiguous_gradients=3"),
        ({"stage": 1, "offload_optimizer": "cpu"}, "offload_optimizer must be an object"),
        ({"stage": 3, "max_live_parameters": [1]}, "max_live_parameters=[1]"),
    ],
)
def test_a_wrong_zero_section_is_told_by_file_and_key(tmp_path: Path, zero: dict[str, Any], key: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: zero_optimization\.{re.escape(key)}"):
        plan(ds_config=path)


def test_short_names_of_stage_3_and_counts_as_json_writes_them_are_read() -> None:
    short = {"max_live_parameters": 5e7, "max_reuse_distance": 2, "prefetch_bucket_size": 3}
    short["param_persistence_threshold"] = 4
    found = ZeroSettings.of({"zero_optimization": {"stage": 3, **short}})
    assert (found.max_live, found.max_reuse_distance, found.prefetch_bucket, found.persistence) == (50_000_000, 2, 3, 4)


def test_a_stored_four_bit_folder_is_judged_by_the_run(tmp_path: Path) -> None:
    write_shape(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = tmp_path / "run.yaml"
    run.write_text("model: {bits: 16}\n")
    with pytest.raises(InputError, match=r"stored quantised, model\.bits=16"):
        plan(model=str(tmp_path), run=run)


def test_names_of_gpus_ignore_case() -> None:
    assert find_gpu("H100") == GPUS["h100"]


def test_the_cpu_is_measured() -> None:
    cpu = measure_cpu(size=128, repeats=1)
    assert cpu.device_type == "cpu"
    assert cpu.flops > 1e8
    assert cpu.memory_bandwidth > 1e7


def test_stage_0_on_several_gpus_is_held_against_zero_1_in_its_reasons() -> None:
    found = recommend(tuned("llama-2-7b"), Cluster(GPUS["h100"], 8), SampleSizes(), 128, STAGES)
    assert found is not None
    assert found.reasons[0] == "stage 0 fits: nothing need be partitioned"
    assert found.reasons[1].startswith("measure ZeRO-1 too")


def test_a_higher_stage_is_taken_where_its_memory_makes_it_faster() -> None:
    """No stage that is recommended is predicted slower than one above it."""
    model, samples, chosen = tuned("llama-2-7b"), SampleSizes(), set()
    for tenths in range(56, 250, 8):
        cluster = Cluster(dataclasses.replace(GPUS["h100"], memory_bytes=tenths * 2**30 // 10), 8)
        found = recommend(model, cluster, samples, 128, STAGES)
        if found is None:
            continue
        chosen.add(found.stage)
        for stage in range(found.stage + 1, 4):
            alone = recommend(model, cluster, samples, 128, {stage: STAGES[stage]})
            assert alone is None or alone.step.tokens_per_s <= WORTH * found.step.tokens_per_s
    assert 0 in chosen


def test_plan_recomputes_as_few_layers_as_the_gpu_asks_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    found = {}
    for target in (0, 16, 9):
        run.write_text(f"model: {{activation_checkpointing: auto, memory_target_gib: {target}}}\n")
        main(["plan", "--gpu", "h100", "--run", str(run), "--tokens-per-microbatch", "4096", "--json"])
        predicted = json.loads(capsys.readouterr().out.splitlines()[-1])["predictions"][0]
        found[target] = predicted["recomputed_layers"]
        assert predicted["device_bytes"] <= (target or 79.1) * 2**30
    assert found[0] == 0
    assert 0 < found[16] < found[9] <= 32
