"""How much memory 4-bit loading takes beside what the model keeps: measured from outside, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import write_llama

ROOT = Path(__file__).parents[2]
VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS = 4000, 1024, 2816, 6
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
LARGEST = HIDDEN * INTERMEDIATE
"""elements of the largest linear layer; a whole decoder layer has four times as many"""

WARM_UP = """
import sys
from pathlib import Path
import torch
from llara_dist.config import ModelConfig
from llara_dist.model.llama import load_llama
from llara_dist.model.quantize import quantize
torch.set_num_threads(1)
small, model, out = sys.argv[1:]
load_llama(ModelConfig(path=small), torch.device("cpu"))  # imports, tables, thread pools
quantize(small, Path(out + "-small"))
print("ready", flush=True)
sys.stdin.readline()
"""
LOAD = """
model = load_llama(ModelConfig(path=model), torch.device("cpu"))
sizes = [value.nbytes for value in model.state_dict().values()]
print(sum(sizes), flush=True)
sys.stdin.readline()
"""
QUANTIZE = """
result = quantize(model, Path(out), max_shard_mib=16)
print(result["bytes"], flush=True)
sys.stdin.readline()
"""


@dataclass(frozen=True)
class Measured:
    """Memory of one action.

    Attributes:
        peak: most anonymous bytes resident at once, above those before it.
        reported: bytes that the process says it made.
    """

    peak: int
    reported: int


def anonymous(pid: int) -> int:
    """Bytes of a process that no file backs: heap and private mappings, without pages of mapped files."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon:"))


def measure(code: str, small: Path, model: Path, out: Path) -> Measured:
    """Run code in a new process and watch its memory from this one, which its Python lock does not stop."""
    with subprocess.Popen(
        [sys.executable, "-c", WARM_UP + code, str(small), str(model), str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert "ready\n" in iter(process.stdout.readline, "")
        before = peak = anonymous(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        with ThreadPoolExecutor(1) as reader:
            answer = reader.submit(lambda lines: next(line for line in lines if line.strip().isdigit()), process.stdout)
            while not answer.done():
                peak = max(peak, anonymous(process.pid))
                time.sleep(0.0005)
        process.stdin.close()  # it ends where nothing more can be read
        return Measured(peak - before, int(answer.result()))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_llama(folder)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 85 million parameters in several files, once in each dtype: 325 MiB, 163 MiB, 163 MiB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        max_position_embeddings=256,
    )
    model: Any = LlamaForCausalLM(config)
    for dtype in SIZES:
        model.to(getattr(torch, dtype)).save_pretrained(folder / dtype, max_shard_size="60MB")
        assert len(list((folder / dtype).glob("*.safetensors"))) > 2
    return folder


def report(what: str, measured: Measured, bound: float, source: Path) -> None:
    held = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    print(
        f"{what}: peak {measured.peak / 2**20:.1f} MiB anonymous, bound {bound / 2**20:.1f} MiB; "
        f"tensors {measured.reported / 2**20:.1f} MiB, source {held / 2**20:.1f} MiB"
    )


@pytest.mark.long
@pytest.mark.parametrize("dtype", SIZES)
def test_loading_holds_the_tensors_it_keeps_and_less_than_two_layers(
    sources: Path, small: Path, tmp_path: Path, dtype: str
) -> None:
    """Tensors of the loaded model, and two of its largest linear layers as they are stored."""
    measured = measure(LOAD, small, sources / dtype, tmp_path / "out")
    bound = measured.reported + 2 * LARGEST * SIZES[dtype]
    report(f"quantised at load from {dtype}", measured, bound, sources / dtype)
    assert 0.9 * measured.reported < measured.peak <= bound


@pytest.mark.long
def test_writing_a_quantised_model_holds_one_shard_and_loading_it_its_own_tensors(
    sources: Path, small: Path, tmp_path: Path
) -> None:
    measured = measure(QUANTIZE, small, sources / "bfloat16", tmp_path / "nf4")
    index = json.loads((tmp_path / "nf4" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    # A full shard waits until the next parameter, at most the head, is there to tell that it is full.
    bound = (16 << 20) + (VOCABULARY * HIDDEN + 2 * LARGEST) * SIZES["bfloat16"]
    report("quantize, shards of 16 MiB", measured, bound, sources / "bfloat16")
    assert measured.peak <= bound
    measured = measure(LOAD, small, tmp_path / "nf4", tmp_path / "out")
    report("loaded as stored", measured, measured.reported + LARGEST, tmp_path / "nf4")
    assert 0.9 * measured.reported < measured.peak <= measured.reported + LARGEST  # two packed layers
