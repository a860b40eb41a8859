"""What a person sees of a reproduced step, and the folder that keeps it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llara_dist.console import say, table
from llara_dist.errors import InputError
from llara_dist.integrity import json_text, staged_folder
from llara_dist.replay.history import Layout
from llara_dist.replay.inspection import MicrobatchResult, SampleResult
from llara_dist.replay.occurrences import Occurrence
from llara_dist.replay.world import StepInspection
from llara_dist.stream.loader import SharedStep, Step
from llara_dist.training.debug import MARK, check_folder, debug_folder, describe_sample, dump_batch

RANKS, SAMPLES, TEXTS = 32, 24, 3
"""most ranks and samples in a table, samples with their text; the folder holds all of them"""
REPORT = "report.json"


def report_folder(run: Path, out: Path | None, step: int) -> Path:
    """Where the report of a step lies; it is not made yet.

    Args:
        run: the run's folder.
        out: as given; None = RUN-debug beside the run, which the next `train --debug` clears.
        step: optimizer step.

    Raises:
        InputError: it would lie in the run's folder, or among what is not ours.
    """
    name = f"report-step-{step:08d}"  # not as checkpoints are called: it takes the place of what is there
    if out is None:
        beside = debug_folder(run)
        check_folder(beside)
        return beside / MARK / name
    if Path(out).resolve().is_relative_to(Path(run).resolve()):
        raise InputError(f"--out {out}: lies in the run's own folder, which is left alone; choose another one")
    folder = Path(out) / name
    if folder.exists() and not (folder / REPORT).is_file():
        raise InputError(f"{folder}: exists and is no report of `llara-dist debug`; choose another --out")
    return folder


def show_shares(step: int, total_steps: int, layout: Layout, shared: SharedStep, probability: float) -> None:
    """Each rank's share of a step; of many ranks those with the most and the least tokens."""
    info, hybrid, lengths = shared.info, shared.hybrid, shared.lengths
    rows = []
    for rank, parts in enumerate(shared.shares.rows):
        mine = [row for part in parts for row in part.tolist()]
        numbers = (len(parts), len(mine), hybrid[mine].sum(), lengths[mine].sum(), info.answer_tokens[mine].sum())
        rows.append([rank, *map(int, numbers)])
    listed = rows
    if len(rows) > RANKS:
        by_tokens = sorted(rows, key=lambda row: row[4])
        listed = [*by_tokens[: RANKS // 2], *by_tokens[-RANKS // 2 :]]
    title = (
        f"step {step} of {total_steps}: {len(info.keys)} samples, p {probability:.3f}, {layout.world_size} ranks, "
        f"{layout.max_tokens_per_microbatch} tokens a micro-batch (by {layout.known_from})"
    )
    table(title, ["rank", "micro-batches", "samples", "hybrid", "tokens", "labels"], listed)
    if len(listed) < len(rows):
        say(f"{len(listed)} of {len(rows)} ranks: those with the least and the most tokens")


def show_occurrences(run: Path, key: int, found: Sequence[Occurrence], last_logged: int) -> None:
    """In which steps a sample occurs, and how to look at one of them."""
    columns = ["step", "epoch", "pass", "rank/micro", "form", ""]
    rows = []
    for each in found:
        when = "" if each.step <= last_logged else "not logged yet"
        rows.append([each.step, each.epoch, each.pass_index, f"{each.rank}/{each.microbatch}", each.form, when])
    table(f"sample {key} in {run}", columns, rows)
    if found:
        say(f"look at it: llara-dist debug --run {shlex.quote(str(run))} --step {found[0].step} --rank {found[0].rank}")


def show_and_write(folder: Path, report: dict[str, Any], found: StepInspection, step: Step, tokenizer: object) -> None:
    """Show what a step gave, samples by loss, and write all of it.

    The folder gets `report.json`, `samples.txt` with each sample's text, and each micro-batch's tensors as
    `rank-00017-000.safetensors`.

    Args:
        folder: replaced, if a report of the same step is there.
        report: what `llara-dist debug` returns.
        found: what the micro-batches gave.
        step: with the same micro-batches.
        tokenizer: the model's.
    """
    samples = by_loss(sample for each in found.microbatches for sample in each.samples)
    batches = dict(zip(step.places, step.microbatches, strict=True))
    texts = []
    for each in samples:
        text, labels = describe_sample(batches[each.rank, each.microbatch], each.place, tokenizer)
        where = f"rank {each.rank}, micro-batch {each.microbatch}, {each.form}, loss {_number(each.loss)}"
        texts.append(f"sample key {each.key} ({where}):\n{text}\nlabels:\n  " + "\n  ".join(labels))
    with staged_folder(folder, replace=True) as staging:
        (staging / REPORT).write_text(json_text(report), encoding="utf-8")
        (staging / "samples.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        for (rank, turn), batch in batches.items():
            dump_batch(batch, staging / f"rank-{rank:05d}-{turn:03d}.safetensors")
    _show_microbatches(found.microbatches)
    _show_samples(samples)
    for text in texts[:TEXTS]:
        say("\n" + text)
    _show_step(report)
    say(f"batches, all samples and this report: {folder}")


def by_loss(samples: Iterable[SampleResult]) -> list[SampleResult]:
    """The samples whose loss or gradient is not finite first, then those with the highest loss."""
    return sorted(samples, key=lambda sample: (sample.is_finite, -(sample.loss or 0.0)))


def _show_microbatches(results: Sequence[MicrobatchResult]) -> None:
    rows = []
    for each in results:
        sizes = (len(each.samples), each.tokens, each.answer_tokens)
        numbers = (_number(_per_token(each)), _number(each.grad_norm), each.problem or "yes")
        rows.append([f"{each.rank}/{each.microbatch}", *sizes, *numbers])
    columns = ["rank/micro", "samples", "tokens", "labels", "loss", "gradient", "finite"]
    table("micro-batches; gradient: the norm of its part of the step's", columns, rows)


def _show_samples(samples: Sequence[SampleResult]) -> None:
    with_gradients = any(each.grad_norm is not None for each in samples)
    rows = []
    for each in samples[:SAMPLES]:
        sizes = (each.form, each.tokens, each.slots, each.answer_tokens)
        row = [f"{each.rank}/{each.microbatch}", each.key, *sizes, _number(each.loss)]
        rows.append([*row, _number(each.grad_norm)] if with_gradients else row)
    columns = ["rank/micro", "key", "form", "tokens", "slots", "labels", "loss", *["gradient"] * with_gradients]
    title = "samples by loss" + (f", the first {SAMPLES} of {len(samples)}" if len(samples) > SAMPLES else "")
    table(title, columns, rows)


def _show_step(report: dict[str, Any]) -> None:
    logged = report["logged"]
    if not report["is_whole_step"]:
        say("the step's own loss and gradient norm need every rank: --rank all")
        return
    rows = []
    for name in ("loss", "grad_norm"):
        here, there = report[name], None if logged is None else logged[name]
        apart = "" if here is None or not there else f"{abs(here - there) / abs(there):.1e}"
        rows.append([name.replace("_", " "), _number(here), "" if logged is None else _number(there), apart])
    table(f"step {report['step']}", ["", "here", "logged by the run", "relative difference"], rows)


def _per_token(result: MicrobatchResult) -> float | None:
    return None if result.loss_sum is None else result.loss_sum / max(1, result.answer_tokens)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5g}"
