"""Sizes of real micro-batches and of those that are planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llara_dist.config import DataConfig
from llara_dist.cost.work import SampleSizes, Work, distinct
from llara_dist.stream.batch import empty_batch
from llara_dist.stream.locations import node_cache, open_samples
from tests.models import packed_row


def test_sizes_of_a_real_row() -> None:
    batch = packed_row()
    lengths = batch.cu_seqlens.diff().tolist()
    work = Work.of([batch])
    assert work.tokens == sum(lengths) == batch.num_tokens
    mask = torch.block_diag(*[torch.ones(length, length).tril() for length in lengths])
    assert work.pairs == int(mask.sum())
    assert work.computed_pairs("packed") == work.pairs
    assert work.computed_pairs("eager") == mask.numel()
    assert work.answer_tokens == len(batch.labels)
    rows = batch.sample_of_label.bincount() + 1
    assert work.answer_rows == int(rows.sum())
    assert work.answer_pairs == int(rows @ batch.cu_seqlens.diff().to(torch.int64))
    assert work.items == len(set(batch.unique_items.tolist()))


def test_sizes_add_up_and_a_stand_in_counts_as_what_it_computes() -> None:
    batch = packed_row()
    both = Work.of([batch, empty_batch()])
    assert both == Work.of([batch]) + Work.of([empty_batch()])
    assert both.tokens == batch.num_tokens + 2


def test_sizes_of_shards(inputs: Path) -> None:
    shards = open_samples(inputs / "shards", "train", node_cache(DataConfig()))
    sizes = SampleSizes.of(shards.info, shards.longest)
    assert sizes.longest == shards.longest
    assert 0 < sizes.mean < sizes.longest
    assert SampleSizes.of({"sources": []}, 300) == SampleSizes(mean=300, longest=300)


def test_a_planned_row_is_about_as_large_as_a_real_one() -> None:
    batch = packed_row(60)
    samples = batch.num_samples
    lengths = batch.cu_seqlens.diff()
    sizes = SampleSizes(
        mean=round(batch.num_tokens / samples),
        longest=int(lengths.max()),
        answer_tokens=round(len(batch.labels) / samples),
        slots=round(len(batch.slot_positions) / samples),
    )
    planned, real = sizes.row(batch.num_tokens, items=50), Work.of([batch])
    for name in ("tokens", "pairs", "answer_tokens", "answer_rows", "answer_pairs", "slots"):
        assert getattr(planned, name) == pytest.approx(getattr(real, name), rel=0.2), name


def test_a_micro_batch_is_no_larger_than_the_share_of_its_rank() -> None:
    sizes = SampleSizes(mean=200, longest=300)
    assert sizes.largest_row(4096, 100, 50) == sizes.row(4096, 50)
    few = sizes.largest_row(4096, 2, 50)
    assert few.tokens == 2 * 300
    assert few.answer_tokens == 2 * sizes.answer_tokens
    assert few.slots == 2 * sizes.slots


def test_distinct_items() -> None:
    assert distinct(1, 50) == pytest.approx(1)
    assert distinct(10_000, 50) == pytest.approx(50)
    assert 30 < distinct(50, 50) < 33
