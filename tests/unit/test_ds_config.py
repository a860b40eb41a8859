"""What a ds_config may not say: every problem of a file at once, each with what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llara_dist.ds_config import FIXED, OURS, REFUSED, check_ds_config, load_ds_config, read_ds_config
from llara_dist.errors import FindingsError, InputError
from llara_dist.training.preflight.consistency import check_zero_section
from tests.runs import ROOT


def said(config: dict, severity: str = "error") -> list[str]:
    """The lines of one severity."""
    return [finding.line for finding in check_ds_config(config, "ds.json") if finding.severity == severity]


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_our_own_files_pass_without_a_word(path: Path) -> None:
    ds_config = load_ds_config(path)
    assert check_ds_config(ds_config, str(path)) == []
    assert check_zero_section(ds_config, str(path), torch.device("cpu")) == []


@pytest.mark.parametrize("key", [*OURS, *REFUSED])
def test_keys_that_would_fight_the_run(key: str) -> None:
    (line,) = said({key: {"enabled": True}})
    assert line.startswith(f"ds.json: {key} may not be set")
    assert line.endswith("remove it")


@pytest.mark.parametrize("key", REFUSED)
def test_a_feature_that_is_off_is_let_pass(key: str) -> None:
    assert said({key: {"enabled": False}}) == []


@pytest.mark.parametrize("name", FIXED)
def test_keys_with_one_right_value(name: str) -> None:
    section, _, key = name.rpartition(".")
    right = FIXED[name][0]
    for value, complaints in ((right, 0), ((not right) if isinstance(right, bool) else "bf16", 1)):
        found = said({section: {key: value}} if section else {key: value})
        assert len(found) == complaints
        assert all(name in line for line in found)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": True}, "stage=True is not 0, 1, 2 or 3"),
        ({"stage": "3"}, "stage='3' is not 0, 1, 2 or 3"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "offload_optimizer.device=nvme"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "offload_param: never tried with packed 4-bit weights"),
        ({"stage": 2, "cpu_offload": True}, "write offload_optimizer instead"),
        ({"stage": 2, "zenflow": {"topk_ratio": 0.1}}, "zenflow replaces the optimizer's state"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}, "super_offload"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, ".ratio replace the optimizer"),
        ({"stage": 3, "stage3_prefetch_bucket_size": "auto"}, 'stage3_prefetch_bucket_size="auto"'),
    ],
)
def test_zero_settings_that_do_not_work_here(zero: dict, message: str) -> None:
    (line,) = said({"zero_optimization": zero})
    assert message in line


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimisation": {"stage": 3}}, "did you mean zero_optimization?"),
        ({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10_000}}, "shards LoRA matrices"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": True}}, "overlap_comm with contiguous_gradients"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size: never tried"),
    ],
)
def test_what_is_worth_a_warning(config: dict, message: str) -> None:
    assert said(config) == []
    (line,) = said(config, "warning")
    assert message in line


@pytest.mark.parametrize(
    "config",
    [
        {"steps_per_print": 10, "wall_clock_breakdown": True, "comms_logger": {"enabled": True}},
        {"flops_profiler": {"enabled": True}, "tensorboard": {"enabled": True}, "dump_state": True},
        {"bf16": {"enabled": False}, "zero_optimization": {"stage": 2, "overlap_comm": False}},
        {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100_000}},
        {"zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": False}},
        {
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "cpu"},
                "offload_param": {"device": "none"},
            }
        },
    ],
)
def test_what_only_tells_how_zero_works_or_what_is_printed_passes(config: dict) -> None:
    assert check_ds_config(config, "ds.json") == []


def test_all_problems_of_a_file_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    zero = {"stage": 4, "zero_quantized_weights": True}
    path.write_text(json.dumps({"train_batch_size": 8, "amp": {}, "zero_optimization": zero, "communicate": 1}))
    with pytest.raises(FindingsError) as error:
        read_ds_config(path)
    assert len(error.value.findings) == 4
    assert "4 findings" in str(error.value)


def test_a_key_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 1, "stage": 3}}')
    with pytest.raises(InputError, match="'stage' is given twice"):
        load_ds_config(path)


def test_deepspeed_is_asked_about_the_rest() -> None:
    config = {"zero_optimization": {"stage": 5, "reduce_bucket_size": -1, "algather_bucket_size": 5}}
    ours = check_ds_config(config, "ds.json")
    lines = [finding.line for finding in check_zero_section(config, "ds.json", torch.device("cpu"), ours)]
    assert len(lines) == 2  # the stage is said by the other
    assert any("reduce_bucket_size" in line for line in lines)
    assert any("did you mean allgather_bucket_size?" in line for line in lines)
