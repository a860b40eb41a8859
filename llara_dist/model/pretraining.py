"""Pre-train a tiny Llama from scratch on prompts of this task, so that it can read, match and copy before tuning.

Three kinds of rows, from easy to hard: repeat the whole list of candidates, answer with one of very few candidates,
answer with one of many. A linear read-out at each candidate, thrown away afterwards, is taught the candidate's chance:
one answer a row alone says too little to a model of a million parameters. Matrices are trained with Muon (Jordan et
al. 2024: momentum, orthogonalised by a Newton-Schulz iteration), the rest with AdamW.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llara_dist.data.units import encode_rows
from llara_dist.model.catalogues import DrawnRows, Lesson, RowSource

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_MATCHING_STEPS = 250
"""steps in which copying hardly counts: matching starts from a faint gradient, which copying's drowns"""
_NAME_WEIGHT = 0.5
"""of the read-out that names each candidate's first token; without it copying takes thousands of steps"""
_SKILL_TO_GROW = 0.65
"""first answer tokens right, as a share of what the best guess gets, above which lessons grow harder"""
_SHARE_TO_GROW = 0.2
"""share of all steps that growing from the easiest to the hardest takes at least"""
_TOKENS_PER_TITLE = 3.7
_TOKENS_OF_TEMPLATE = 20


@dataclass(frozen=True)
class PaddedRows:
    """Rows padded on the right to one length T; causal attention never looks at the padding.

    Shapes: tokens int64 [n, T]; slots bool [n, T] with the item of each slot, in reading order, in slot_items int64
    [S]; answers bool [n, T], the answers' tokens, EOS included; readouts int64 [n, C], the position after each
    candidate.
    """

    tokens: Tensor
    slots: Tensor
    slot_items: Tensor
    answers: Tensor
    readouts: Tensor
    title_starts: Tensor


def pad_rows(drawn: DrawnRows, templates: np.ndarray, hybrid: bool, repeat: bool) -> PaddedRows:
    """Encode drawn rows with the prompts of the shards.

    Args:
        drawn: rows of one catalogue.
        templates: int64 [n], the wording of each row.
        hybrid: keep the slots; else they are taken out.
        repeat: the answer is the whole list of candidates instead of the target.
    """
    block = encode_rows(
        drawn.encoder.table(drawn.candidates.shape[1]),
        drawn.history_offsets,
        drawn.history,
        drawn.candidates,
        drawn.targets,
        templates,
    )
    tokens, slots, answers, readouts, firsts = [], [], [], [], []
    for row in range(len(block)):
        ids = block.tokens[block.token_offsets[row] : block.token_offsets[row + 1]].astype(np.int64)
        part = slice(block.slot_offsets[row], block.slot_offsets[row + 1])
        positions = block.slot_positions[part].astype(np.int64)
        after = positions + 1
        is_slot = np.zeros(len(ids), dtype=bool)
        is_slot[positions] = True
        prompt, answer = ids[: block.answer_start[row]], ids[block.answer_start[row] :]
        if repeat:
            shown = slice(block.title_starts[part][block.num_history[row]], positions[-1])
            answer = np.append(ids[shown][~is_slot[shown]], answer[-1])
        is_slot = is_slot[: len(prompt)]
        if not hybrid:
            prompt, after, is_slot = prompt[~is_slot], after - np.arange(1, len(after) + 1), np.zeros(0, dtype=bool)
        tokens.append(np.concatenate([prompt, answer]))
        slots.append(is_slot)
        answers.append((len(prompt), len(prompt) + len(answer)))
        firsts.append(ids[block.title_starts[part]][block.num_history[row] :])
        readouts.append(after[block.num_history[row] :])
    length = max(len(row) for row in tokens)
    padded = np.full((len(tokens), length), drawn.encoder.eos, dtype=np.int64)
    slot_mask = np.zeros((len(tokens), length), dtype=bool)
    answer_mask = np.zeros((len(tokens), length), dtype=bool)
    for row, (ids, is_slot, (start, end)) in enumerate(zip(tokens, slots, answers, strict=True)):
        padded[row, : len(ids)] = ids
        slot_mask[row, : len(is_slot)] = is_slot
        answer_mask[row, start:end] = True
    return PaddedRows(
        tokens=torch.from_numpy(padded),
        slots=torch.from_numpy(slot_mask),
        slot_items=torch.from_numpy(block.slot_items.astype(np.int64)),
        answers=torch.from_numpy(answer_mask),
        readouts=torch.from_numpy(np.stack(readouts)),
        title_starts=torch.from_numpy(np.stack(firsts)),
    )


def random_projections(latents: Tensor, width: int, rms: float, generator: torch.Generator) -> Tensor:
    """Map each row's item vectors into the model's input space by a map of its own: linear, or a GELU network.

    Args:
        latents: float32 [n, S, LATENT_DIM], root mean square 1 in each row.
        width: hidden size h.
        rms: of token embeddings; each row's result is within a factor of 2.5 of it.
        generator: draws the maps.

    Returns:
        float32 [n, S, h].
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows, _, dim = latents.shape
    linear = latents @ normal(rows, dim, width)
    inner = F.gelu(latents @ normal(rows, dim, width) / math.sqrt(dim) + 0.2 * normal(rows, 1, width))
    network = inner @ normal(rows, width, width) / math.sqrt(width) + 0.1 * normal(rows, 1, width)
    projected = torch.where(torch.rand(rows, 1, 1, generator=generator) < 0.4, linear, network)
    spread = torch.exp(1.8 * torch.rand(rows, 1, 1, generator=generator) - 0.9)
    return projected * (rms * spread / projected.square().mean((1, 2), keepdim=True).sqrt())


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised, in float32 (torch.optim.Muon's bfloat16 is slow on CPUs).

    Args:
        params: matrices.
        lr: size of an update's singular values for a square matrix.
        momentum: of the running sum of gradients.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                buffer = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                buffer.mul_(group["momentum"]).add_(matrix.grad)
                update = orthogonalise(matrix.grad + group["momentum"] * buffer)
                matrix.add_(update, alpha=-group["lr"] * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Move all singular values of a matrix near 1 by five Newton-Schulz steps."""
    a, b, c = _NEWTON_SCHULZ
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


def lesson_of(
    rng: np.random.Generator, level: float, source: RowSource, tokens: int, hybrid_share: float
) -> tuple[Lesson, bool]:
    """Choose a step's lesson and whether its answer repeats the list.

    Args:
        rng: draws it.
        level: 0 = a few candidates, clear signals; 1 = the source's most, signals as in the worlds to come.
        source: its most history and candidates are shown at level 1.
        tokens: roughly how many a step may take.
        hybrid_share: share of hybrid lessons.
    """
    most_candidates = 4 + round((source.max_candidates - 4) * level)
    most_history = 3 + round((source.max_history - 3) * level)
    repeat = bool(rng.random() < 0.2 * (1 - level))
    if rng.random() < 0.4 - 0.3 * level:
        candidates, history = 4, 3
    else:
        fewest = 4 + round((most_candidates - 4) * 0.4)
        candidates = int(rng.integers(fewest, most_candidates + 1))
        history = int(rng.integers(3, most_history + 1))
    length = _TOKENS_OF_TEMPLATE + _TOKENS_PER_TITLE * (candidates * (2 if repeat else 1) + history)
    hybrid = bool(rng.random() < hybrid_share)
    ease = float(max(0.0, 0.9 - level)) if rng.random() < 0.8 else 0.0
    return Lesson(max(8, int(tokens / length)), history, candidates, hybrid, ease), repeat


@dataclass(frozen=True)
class StepReport:
    """What one step did: mean loss of answer tokens and of the read-out, share of first answer tokens right, and the
    share that the candidate with the highest chance would get."""

    step: int
    hybrid: bool
    repeat: bool
    candidates: int
    loss: float
    readout_loss: float
    first_right: float
    best_right: float
    level: float
    tokens: int


def pretrain(
    model: LlamaForCausalLM,
    source: RowSource,
    *,
    slots: bool,
    steps: int,
    tokens_per_step: int,
    lr: float,
    matrix_lr: float,
    seed: int,
    level: float = 0.0,
    hybrid_share: float = 0.65,
    report: Callable[[StepReport], None] | None = None,
) -> None:
    """Train all weights of `model` in place for a fixed number of steps; equal arguments give equal weights.

    Args:
        model: float32, untied or tied head.
        source: where rows come from.
        slots: whether the source has vectors to fill slots with.
        steps: optimizer steps.
        tokens_per_step: roughly, padding included.
        lr: AdamW's, of embeddings, norms and the read-out.
        matrix_lr: Muon's, of the layers' matrices.
        seed: of rows, projections and the read-out.
        level: how hard the first lessons are, 0 to 1; a fresh model starts at 0.
        hybrid_share: share of steps whose slots are filled, where the source has vectors.
        report: called after each step.
    """
    rng = np.random.default_rng([seed, 0x7124])
    generator = torch.Generator().manual_seed(seed)
    embed: Any = model.get_input_embeddings()
    embedding: Tensor = embed.weight
    width = embedding.shape[1]
    readout = (torch.randn(width, generator=generator) * width**-0.5).requires_grad_()
    gather = torch.eye(width).requires_grad_()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    chosen = {id(matrix) for matrix in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(matrices, matrix_lr),
        torch.optim.AdamW([*others, readout, gather], lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    rates = [matrix_lr, lr]
    skill = 0.0
    matching_steps = _MATCHING_STEPS if level == 0.0 else 0
    model.train()
    for step in range(steps):
        lesson, repeat = lesson_of(rng, level, source, tokens_per_step, hybrid_share if slots else 0.0)
        drawn = source.draw(rng, lesson)
        templates = rng.integers(len(drawn.encoder.templates), size=lesson.rows)
        rows = pad_rows(drawn, templates, lesson.hybrid, repeat)
        inputs = embed(rows.tokens)
        if drawn.latents is not None:
            rms = float(embedding.detach().square().mean().sqrt())
            vectors = random_projections(torch.from_numpy(drawn.latents), width, rms, generator).flatten(0, 1)
            inputs = inputs.masked_scatter(rows.slots[..., None], vectors[rows.slot_items])
        output = model.model(inputs_embeds=inputs, use_cache=False, output_hidden_states=True)
        assert output.last_hidden_state is not None
        assert output.hidden_states is not None
        row, column = rows.answers.nonzero(as_tuple=True)
        labels = rows.tokens[row, column]
        logits = model.lm_head(output.last_hidden_state[row, column - 1])
        loss = F.cross_entropy(logits, labels)
        # Read before the last layer, which then has something to choose by.
        middle = output.hidden_states[-2]
        middle = middle * torch.rsqrt(middle.square().mean(-1, keepdim=True) + 1e-5)
        ends = middle.gather(1, rows.readouts[..., None].expand(-1, -1, width))
        scores = ends @ readout
        name_loss = F.cross_entropy(model.lm_head(ends @ gather).flatten(0, 1), rows.title_starts.flatten())
        readout_loss = -(torch.from_numpy(drawn.chances) * F.log_softmax(scores, -1)).sum(-1).mean()
        scale = min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.zero_grad()
        copying = 0.05 if step < matching_steps else 1.0
        (readout_loss + copying * (loss + _NAME_WEIGHT * name_loss)).backward()
        nn.utils.clip_grad_norm_([*others, readout, gather], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        first = torch.ones_like(row, dtype=torch.bool)
        first[1:] = row[1:] != row[:-1]
        first_right = float((logits.argmax(-1) == labels)[first].float().mean())
        best_right = float((drawn.chances.argmax(1) == drawn.targets).mean())
        if not repeat:
            skill = 0.97 * skill + 0.03 * first_right / max(best_right, 0.1)
        if skill > _SKILL_TO_GROW:
            level = min(1.0, level + 1 / (_SHARE_TO_GROW * steps))
        if report is not None:
            report(
                StepReport(
                    step=step,
                    hybrid=lesson.hybrid,
                    repeat=repeat,
                    candidates=lesson.num_candidates,
                    loss=float(loss.detach()),
                    readout_loss=float(readout_loss.detach()),
                    first_right=first_right,
                    best_right=best_right,
                    level=level,
                    tokens=rows.tokens.numel(),
                )
            )
    model.eval()


class ProgressLog:
    """Sums step reports and returns one line, and one record, every so many steps."""

    def __init__(self, every: int, steps: int) -> None:
        self._every, self._steps = every, steps
        self._reports: list[StepReport] = []
        self._tokens = 0
        self._started = time.monotonic()
        self.records: list[dict[str, float]] = []

    def add(self, report: StepReport) -> str | None:
        """Take a step's report; a line when `every` steps have come together."""
        self._reports.append(report)
        self._tokens += report.tokens
        if len(self._reports) < self._every and report.step + 1 < self._steps:
            return None
        record: dict[str, float] = {"step": report.step + 1, "level": round(report.level, 3)}
        for name, hybrid in (("text", False), ("hybrid", True)):
            of = [r for r in self._reports if r.hybrid == hybrid and not r.repeat]
            if of:
                record[f"{name}_loss"] = round(float(np.mean([r.loss for r in of])), 4)
                record[f"{name}_readout_loss"] = round(float(np.mean([r.readout_loss for r in of])), 4)
                record[f"{name}_first_right"] = round(float(np.mean([r.first_right for r in of])), 4)
                record[f"{name}_best_right"] = round(float(np.mean([r.best_right for r in of])), 4)
        self.records.append(record)
        self._reports = []
        seconds = time.monotonic() - self._started
        values = "  ".join(f"{name} {value:.3f}" for name, value in record.items() if name != "step")
        return f"step {report.step + 1}/{self._steps}  {values}  {self._tokens / seconds:,.0f} tokens/s"
