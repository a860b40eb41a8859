"""The projector's kernels against float64 in Triton's interpreter; run by test_projector_op.py in a process of its own.

The interpreter is chosen when a kernel is decorated, by TRITON_INTERPRET=1, for the whole process.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from llara_dist.model.ops import projector_kernels
from tests.projector_cases import CASES, Case, Row, check


def _emulate_bfloat16() -> None:
    """Teach the interpreter what a GPU does: round float32 to the nearest bfloat16, multiply bfloat16 as numbers.

    The one of Triton 3.9 cuts the low bits off, and its products read bfloat16's bits as integers.
    """
    builder, convert = interpreter.InterpreterBuilder, interpreter._convert_float
    multiply = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return multiply(self, a, b, *rest)

    def convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(data).view(np.float32)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, rounding)

    builder.create_dot, interpreter._convert_float = create_dot, convert_float


_emulate_bfloat16()
# Memory from torch.empty holds NaN: what a kernel forgets to write shows.
torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kernels_are_as_close_to_float64_as_eager(case: Case, compute: torch.dtype) -> None:
    def fused(row: Row) -> tuple[Tensor, ...]:
        # A row and a gradient whose positions do not follow each other in memory; what lies between stays as it is.
        written, between = torch.cat([row.embeddings, row.embeddings], 1).split(case.width, 1)
        gradient = torch.cat([row.gradient, row.gradient], 1)[:, : case.width]
        projector_kernels.write(written, *row.arguments, compute)
        assert torch.equal(between, row.embeddings)
        return written, *projector_kernels.gradients(gradient, *row.arguments[:7], compute)

    check(case, compute, "cpu", fused)
