"""What a process with TRITON_INTERPRET=1 runs for test_layers.py: Liger's kernels beside transformers' own, on the CPU.

It prints, for each way of holding the model, how far loss and gradients are apart, and what the forward pass saves
beside what the cost model says, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm
from triton.runtime import interpreter

from llara_dist.config import KernelsConfig, LoraConfig
from llara_dist.cost.activations import activation_bytes
from llara_dist.cost.work import Work
from llara_dist.model.layers import use_liger
from llara_dist.stream.batch import Batch
from llara_dist.training.engine import seed_dropout
from tests.models import build, packed_row, saved_bytes, tuned

HELD: dict[str, dict[str, Any]] = {
    "float32": {"bits": 32},
    "nf4": {"bits": 4},
    "nf4, recomputed": {"bits": 4, "activation_checkpointing": 1},
}
BFLOAT16: dict[str, Any] = {"bits": 4, "compute_dtype": "bfloat16"}
LORA = LoraConfig(dropout=0.1)


def mend_interpreter() -> None:
    """What the interpreter of Triton 3.9 lacks: floats as tensors, which Liger casts, and libdevice's functions."""

    def rsqrt(value: Any) -> Any:
        return tl.rsqrt(value)  # looked up where the interpreter puts its own

    rms_norm.rsqrt = rsqrt
    convert = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = converted


def gradients(folder: Path, held: dict[str, Any], batch: Batch, liger: bool) -> list[torch.Tensor]:
    """The loss and every gradient of one pass, as float64."""
    model = build(folder, held, LORA)
    if liger:
        use_liger(model.llm.base_model.model)
    for name, parameter in model.lora_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    seed_dropout(0, 0, 0, 0)
    loss = model(batch)
    loss.backward()
    return [loss.detach().double(), *(p.grad.double() for p in model.parameters() if p.grad is not None)]


def saved(folder: Path, held: dict[str, Any]) -> tuple[int, int]:
    """Bytes that a forward pass with Liger's kernels saves, and those that the cost model says."""
    model, batch = build(folder, held, LORA), packed_row()
    use_liger(model.llm.base_model.model)
    said = activation_bytes(tuned(folder, held, LORA, KernelsConfig(layers="liger")), Work.of([batch]), "cpu")
    return saved_bytes(model, batch), said.total


def main(folder: Path) -> None:
    """Compare."""
    mend_interpreter()
    batch = packed_row(2)
    found = {}
    for name, held in HELD.items():
        plain, fused, again = (gradients(folder, held, batch, liger) for liger in (False, True, False))
        assert all(map(torch.equal, plain, again))  # models that are made later are transformers' own
        errors = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(plain, fused, strict=True)]
        found[name] = {"errors": errors, "differs": not all(map(torch.equal, plain, fused))}
    print(json.dumps({"gradients": found, "saved": [saved(folder, held) for held in (*HELD.values(), BFLOAT16)]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
