"""`deepspeed`, `torchrun` and the plain command run the same code and give the same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llara_dist.training.metrics_log import read_metrics
from tests.runs import ROOT

BIN = Path(sys.executable).parent
CONFIG = """
data: {epochs: 1, max_steps: 6, global_batch_samples: 7, max_tokens_per_microbatch: 600, workers: 1}
lora: {dropout: 0.0}
device: cpu
"""
STARTERS = {
    "plain": [str(BIN / "llara-dist"), "train"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", "launch/train.py"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "launch/train.py"],
}


def start(starter: str, inputs: Path, out: Path, rendezvous: Path, *options: str) -> subprocess.CompletedProcess[str]:
    config = rendezvous.with_suffix(".yaml")
    config.write_text(CONFIG)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    environment["LLARA_DIST_INIT_METHOD"] = f"file://{rendezvous}"
    arguments = ["--config", str(config), "--model.path", str(inputs / "llm"), "--data.shards", str(inputs / "shards")]
    arguments += ["--recommender.path", str(inputs / "rec"), "--out", str(out), *options]
    command = [*STARTERS[starter], *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def plain(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one plain process."""
    folder = tmp_path_factory.mktemp("plain")
    done = start("plain", inputs, folder / "run", folder / "rendezvous", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 6
    return folder / "run"


@pytest.mark.parametrize("starter", ["deepspeed", "torchrun"])
def test_two_ranks_through_a_launcher(starter: str, inputs: Path, plain: Path, tmp_path: Path) -> None:
    done = start(starter, inputs, tmp_path / "run", tmp_path / "rendezvous")
    assert done.returncode == 0, done.stdout + done.stderr
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["world_size"] == 2
    expected, found = (
        [row["loss"] for row in read_metrics(run / "metrics.jsonl")] for run in (plain, tmp_path / "run")
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_bad_input_under_a_launcher_is_said_once(inputs: Path, tmp_path: Path) -> None:
    done = start("torchrun", inputs, tmp_path / "run", tmp_path / "rendezvous", "--data.shards", "/nowhere")
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("error: /nowhere") == 1


def test_debug_mode_shows_samples_and_dumps_the_first_batch(inputs: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    options = ("--debug", "--curriculum.schedule", "constant", "--curriculum.probability", "0.5")
    done = start("plain", inputs, tmp_path / "run", tmp_path / "rendezvous", *options)
    assert done.returncode == 0, done.stderr
    assert "(text-only):" in done.stdout
    assert "(hybrid):" in done.stdout
    assert "⟨item " in done.stdout
    assert "predicts '</s>'" in done.stdout
    assert "step 3: loss " in done.stdout
    batch = load_file(tmp_path / "run-debug" / "debug" / "first_batch.safetensors")
    assert batch["tokens"].ndim == 1
    assert batch["labels"].shape == batch["label_positions"].shape
    assert not (tmp_path / "run").exists()
