"""What is asked for by name and cannot run: all of it refused at once, or replaced where a run is only read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llara_dist.autotune.questions import questions_for
from llara_dist.autotune.settings import Setting
from llara_dist.config import KernelsConfig, ModelConfig
from llara_dist.errors import FindingsError
from llara_dist.model.kernels import Choose, chooser, runnable
from tests.models import write_shape

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    write_shape(tmp_path)
    return ModelConfig(path=str(tmp_path), bits=32)


def findings(choose: Choose, asked: KernelsConfig) -> list[tuple[str, str]]:
    with pytest.raises(FindingsError) as caught:
        choose(asked)
    return [(finding.check, finding.line) for finding in caught.value.errors]


@pytest.mark.usefixtures("no_cpp_compiler")
def test_every_field_that_cannot_run_is_refused_in_one_form(model: ModelConfig) -> None:
    asked = KernelsConfig("flash2", "triton", "fused", "liger", compile=True)
    assert findings(chooser(model, CPU), asked) == [
        ("kernels here", "kernels.attention=flash2: no GPU; use auto"),
        ("kernels here", "kernels.projector=triton: no GPU; use auto"),
        ("kernels here", "kernels.layers=liger: no GPU; use auto"),
        (
            "kernels here",
            "kernels.compile=true: torch.compile finds no C++ compiler; install g++, name another in CXX, or use false",
        ),
    ]
    # What the stage rules out is told on any machine, also on one that could not run it.
    assert [line for check, line in findings(chooser(model, CPU, 3), asked) if check == "kernels"] == [
        "kernels.projector=triton: ZeRO-3 partitions the projector's weights; use auto",
        "kernels.lora=fused: ZeRO-3 gathers adapters in PEFT's calls; use auto",
        "kernels.compile=true: ZeRO-3 gathers parameters in hooks that a compiled layer skips; use false",
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_packs_rows_is_refused_where_none_are_packed(model: ModelConfig, attention: Any) -> None:
    choose = chooser(ModelConfig(path=model.path, bits=32, attention=attention), CPU)
    for asked in ("flash2", "flash3", "varlen"):
        said = f"kernels.attention={asked}: model.attention={attention} does not pack rows; use auto"
        assert findings(choose, KernelsConfig(attention=asked)) == [("kernels", said)]
    assert choose(KernelsConfig()).attention == choose(KernelsConfig(attention="sdpa")).attention == "sdpa"


def test_a_run_that_is_only_read_gets_what_can_run(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choose = chooser(model, CPU)
    asked = KernelsConfig("flash3", "eager", "fused", "liger", "all", compile=True)
    expected = KernelsConfig("auto", "eager", "fused", "auto", "all", compile=False)
    assert runnable(asked, choose) == expected
    assert choose(expected).values()["layers"] == "torch"
    assert capsys.readouterr().out.splitlines() == [
        "kernels.attention=flash3: no GPU; sdpa computes instead",
        "kernels.layers=liger: no GPU; torch computes instead",
    ]
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert runnable(asked, choose) == expected
    assert capsys.readouterr().out == ""


def test_tune_says_why_a_choice_is_not_tried(model: ModelConfig) -> None:
    choose = chooser(model, CPU, 3)
    start = Setting(600, False, KernelsConfig(**choose(KernelsConfig()).values()))
    _, impossible = questions_for(start, choose)
    said = {trial.what: trial.verdict for trial in impossible}
    assert said["kernels.attention=varlen"] == "not here: no GPU"
    assert said["kernels.lora=fused"] == "not here: ZeRO-3 gathers adapters in PEFT's calls"
    assert said["kernels.compile=true"].startswith("not here: ZeRO-3 gathers parameters")
