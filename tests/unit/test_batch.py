"""Batches: the text-only form is the row without its slots, labels stand where they are predicted."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch

from llara_dist.data.prompts import PromptEncoder
from llara_dist.data.wording import load_templates
from llara_dist.stream.batch import Batch, collate, empty_batch

from . import worlds


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(worlds.byte_level(), worlds.titles(), load_templates("movie"), None)


@pytest.fixture(scope="module")
def samples(encoder):
    rng = np.random.default_rng(0)
    rows = []
    for key in range(12):
        chosen = rng.permutation(60)[: 21 + key % 9]
        rows.append(encoder.encode(chosen[20:], chosen[:20], int(chosen[key]), key % 3, key=100 + key))
    return rows


HYBRID = np.arange(12) % 3 != 1


def rows_of(batch: Batch) -> list[slice]:
    ends = batch.cu_seqlens.tolist()
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def test_rows_are_the_forms(encoder, samples):
    batch = collate(samples, HYBRID)
    for sample, hybrid, row in zip(samples, HYBRID, rows_of(batch), strict=True):
        tokens = batch.tokens[row].numpy()
        assert batch.position_ids[row].tolist() == list(range(len(tokens)))
        if hybrid:
            np.testing.assert_array_equal(tokens, sample.tokens)
        else:
            template = (sample.key - 100) % 3
            whole = encoder.whole_ids(encoder.text(sample.history, sample.candidates, template), sample.target)
            np.testing.assert_array_equal(tokens, whole)
    assert batch.max_seqlen == max(row.stop - row.start for row in rows_of(batch))
    assert batch.keys.tolist() == list(range(100, 112))
    assert batch.hybrid.tolist() == HYBRID.tolist()
    assert batch.num_tokens == rows_of(batch)[-1].stop
    assert (batch.num_samples, batch.is_empty) == (12, False)


def test_slots_point_to_their_items(samples):
    batch = collate(samples, HYBRID)
    expected = []
    for sample, hybrid, row in zip(samples, HYBRID, rows_of(batch), strict=True):
        if hybrid:
            pairs = zip(sample.slot_positions + row.start, sample.slot_items, strict=True)
            expected += [(int(position), int(item)) for position, item in pairs]
    items = batch.unique_items[batch.slot_inverse]
    assert list(zip(batch.slot_positions.tolist(), items.tolist(), strict=True)) == expected
    assert len(set(batch.unique_items.tolist())) == len(batch.unique_items)


@pytest.mark.parametrize(
    "batch_of", [lambda s: collate(s, HYBRID), lambda s: collate(s[:1], [False]), lambda s: collate([], [])]
)
def test_slots_are_grouped_by_item(samples, batch_of):
    batch = batch_of(samples)
    bounds = batch.item_offsets.tolist()
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(batch.slot_positions), len(batch.unique_items) + 1)
    for item, (start, stop) in enumerate(itertools.pairwise(bounds)):
        expected = batch.slot_positions[batch.slot_inverse == item]
        assert batch.item_slots[start:stop].tolist() == expected.tolist()


def test_labels_are_the_answers(encoder, samples):
    batch = collate(samples, HYBRID)
    torch.testing.assert_close(batch.tokens[batch.label_positions + 1], batch.labels)
    assert not set(batch.label_positions.tolist()) & set(batch.slot_positions.tolist())
    for number, (sample, row) in enumerate(zip(samples, rows_of(batch), strict=True)):
        mine = batch.sample_of_label == number
        answer = batch.labels[mine].tolist()
        assert answer == sample.tokens[sample.answer_start :].tolist()
        assert encoder.tokenizer.decode(answer[:-1]).strip() == encoder.shown[sample.target]
        positions = batch.label_positions[mine].tolist()
        assert positions == list(range(row.stop - 1 - len(answer), row.stop - 1))
    assert batch.answer_tokens == sum(sample.answer_end - sample.answer_start for sample in samples)


def test_without_answers_rows_end_before_them(samples):
    whole, cut = collate(samples, HYBRID), collate(samples, HYBRID, answers=False)
    assert cut.answer_tokens == 0
    for sample, long, short in zip(samples, rows_of(whole), rows_of(cut), strict=True):
        answer = sample.answer_end - sample.answer_start
        torch.testing.assert_close(cut.tokens[short], whole.tokens[long][:-answer])
    assert cut.slot_inverse.tolist() == whole.slot_inverse.tolist()


def test_text_only_batch_still_names_an_item(samples):
    batch = collate(samples, np.zeros(12, dtype=bool))
    assert batch.unique_items.tolist() == [0]
    assert len(batch.slot_positions) == len(batch.slot_inverse) == 0


def test_empty_batch_has_no_weight():
    for batch in (empty_batch(), collate([], [])):
        assert batch.is_empty
        assert (batch.num_samples, batch.answer_tokens, len(batch.unique_items)) == (0, 0, 1)
        assert batch.cu_seqlens.tolist() == [0, batch.num_tokens]


def test_dtypes(samples):
    for batch in (collate(samples, HYBRID), collate(samples, ~HYBRID), empty_batch(), collate(samples[:1], [False])):
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor):
                expected = {"cu_seqlens": torch.int32, "item_offsets": torch.int32, "hybrid": torch.bool}.get(
                    name, torch.int64
                )
                assert value.dtype == expected, name


def test_travels_between_processes_and_devices(samples):
    batch = collate(samples, HYBRID)
    for other in (pickle.loads(pickle.dumps(batch)), batch.to("cpu")):
        for name, value in vars(batch).items():
            same = (
                torch.equal(value, getattr(other, name))
                if isinstance(value, torch.Tensor)
                else value == getattr(other, name)
            )
            assert same, name


def test_flags_must_match(samples):
    with pytest.raises(ValueError, match="12 samples, 3"):
        collate(samples, [True] * 3)
