"""One micro-batch, forward and backward, looked at sample by sample."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llara_dist.model.hybrid import HybridLlama
from llara_dist.stream.batch import Batch


@dataclass(frozen=True)
class SampleResult:
    """What one sample gave.

    Attributes:
        rank: whose it is.
        microbatch: of the rank, from 0.
        place: in the packed row, from 0.
        key: the sample's.
        form: hybrid or text-only.
        tokens: positions.
        slots: behaviour tokens.
        answer_tokens: labels.
        loss: mean cross-entropy over its answer tokens, nats; None where it is not finite.
        grad_norm: of its part of the step's loss; None where not asked for or not finite.
        is_finite: whether loss, and gradients where asked for, are finite.
    """

    rank: int
    microbatch: int
    place: int
    key: int
    form: str
    tokens: int
    slots: int
    answer_tokens: int
    loss: float | None
    grad_norm: float | None
    is_finite: bool


@dataclass(frozen=True)
class MicrobatchResult:
    """What one micro-batch gave.

    Attributes:
        rank: whose it is.
        microbatch: of the rank, from 0.
        tokens: positions.
        answer_tokens: labels.
        loss_sum: cross-entropy summed over its answer tokens, nats; None where it is not finite.
        grad_norm: of its part of the step's gradient; None where it is not finite.
        problem: where the first value came up that is not finite; "" where all are.
        samples: one result each.
    """

    rank: int
    microbatch: int
    tokens: int
    answer_tokens: int
    loss_sum: float | None
    grad_norm: float | None
    problem: str
    samples: list[SampleResult]


def inspect_microbatch(
    model: HybridLlama,
    parameters: list[nn.Parameter],
    batch: Batch,
    place: tuple[int, int],
    step_answer_tokens: int,
    device: torch.device,
    per_sample: bool,
) -> tuple[MicrobatchResult, list[Tensor] | None]:
    """Forward and backward with anomaly detection, without touching `.grad`; torch's generator is seeded already.

    Args:
        model: in training mode.
        parameters: that train.
        batch: on the host; not an empty stand-in.
        place: rank and micro-batch.
        step_answer_tokens: labels of the whole global step, by which the loss is divided.
        device: of the model.
        per_sample: whether each sample's gradient is computed as well, one backward pass each.

    Returns:
        What it gave, and its part of the step's gradient, a tensor a parameter; None where that is not finite.
    """
    with first_not_finite(model) as outputs, torch.autograd.set_detect_anomaly(True):
        on_device = batch.to(device)
        losses = F.cross_entropy(model.answer_logits(on_device), on_device.labels, reduction="none")
        sums = losses.new_zeros(len(batch.keys)).index_add(0, on_device.sample_of_label, losses)
        norms: list[float | None] = [None] * len(batch.keys)
        gradients, problem = None, f"output of {outputs[0]}" if outputs else ""
        if not problem and not bool(losses.isfinite().all()):
            problem = "the loss"
        if not problem:
            for number, own in enumerate(sums if per_sample else ()):
                of_sample, wrong = _gradients(own / step_answer_tokens, parameters, retain=True)
                norms[number], problem = _norm(of_sample), problem or wrong
            gradients, wrong = _gradients(losses.sum() / step_answer_tokens, parameters)
            problem = problem or wrong
    samples = _samples(batch, place, sums.detach().tolist(), norms if per_sample else None)
    result = MicrobatchResult(
        rank=place[0],
        microbatch=place[1],
        tokens=batch.num_tokens,
        answer_tokens=batch.answer_tokens,
        loss_sum=_finite(float(losses.detach().sum(dtype=torch.float64))),
        grad_norm=_norm(gradients),
        problem=problem,
        samples=samples,
    )
    return result, gradients


def _samples(
    batch: Batch, place: tuple[int, int], sums: list[float], norms: list[float | None] | None
) -> list[SampleResult]:
    lengths = batch.cu_seqlens.diff()
    answers = torch.bincount(batch.sample_of_label, minlength=len(lengths)).tolist()
    owner = torch.searchsorted(batch.cu_seqlens[1:].long(), batch.slot_positions, right=True)
    slots = torch.bincount(owner, minlength=len(lengths)).tolist()
    found = []
    for number, (key, hybrid, length) in enumerate(
        zip(batch.keys.tolist(), batch.hybrid.tolist(), lengths.tolist(), strict=True)
    ):
        loss = _finite(sums[number] / answers[number])
        norm = None if norms is None else norms[number]
        found.append(
            SampleResult(
                rank=place[0],
                microbatch=place[1],
                place=number,
                key=key,
                form="hybrid" if hybrid else "text-only",
                tokens=length,
                slots=slots[number],
                answer_tokens=answers[number],
                loss=loss,
                grad_norm=norm,
                is_finite=loss is not None and (norms is None or norm is not None),
            )
        )
    return found


def _gradients(loss: Tensor, parameters: list[nn.Parameter], retain: bool = False) -> tuple[list[Tensor] | None, str]:
    """Gradients, None where one is not finite, and then what says so."""
    try:
        found = torch.autograd.grad(loss, parameters, retain_graph=retain, materialize_grads=True)
    except RuntimeError as error:
        if "returned nan values" not in str(error):  # anomaly detection's words
            raise
        return None, f"backward: {str(error).splitlines()[0]}"
    if not all(bool(gradient.isfinite().all()) for gradient in found):
        return None, "backward: a gradient is infinite"
    return list(found), ""


def _norm(gradients: list[Tensor] | None) -> float | None:
    return None if gradients is None else float(torch.nn.utils.get_total_norm(gradients))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@contextmanager
def first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Watch every module's output; the list gets the name of the first one, in time, that is not finite."""
    names: list[str] = []

    def look(name: str, output: Any) -> None:
        tensors = [output] if isinstance(output, Tensor) else output if isinstance(output, tuple) else ()
        if not names and any(isinstance(tensor, Tensor) and not bool(tensor.isfinite().all()) for tensor in tensors):
            names.append(name)

    handles = [
        module.register_forward_hook(lambda _module, _arguments, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()
