"""Samples → one packed row of tensors, with everything a step needs, so that the step waits for no host work."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llara_dist.data.rows import ranges
from llara_dist.data.samples import Sample


@dataclass(frozen=True)
class Batch:
    """One micro-batch: N samples end to end in one row of T positions.

    A hybrid sample keeps its slots (one position each, whose embedding the model overwrites); a text-only sample is
    the same row with the slot positions taken out.
    """

    tokens: torch.Tensor
    """int64 [T]"""
    position_ids: torch.Tensor
    """int64 [T], from 0 in every sample"""
    cu_seqlens: torch.Tensor
    """int32 [N+1]: where samples begin, and T"""
    max_seqlen: int
    """longest sample, positions"""
    lengths: tuple[int, ...]
    """N: positions of each sample, known to the host without asking the device"""
    answer_lengths: tuple[int, ...]
    """N: labels of each sample"""
    slot_positions: torch.Tensor
    """int64 [S]: positions to overwrite with behaviour embeddings"""
    unique_items: torch.Tensor
    """int64 [U], never empty (item 0 where there is no slot): the projector takes part in every micro-batch"""
    slot_inverse: torch.Tensor
    """int64 [S]: slot s holds item unique_items[slot_inverse[s]]"""
    item_slots: torch.Tensor
    """int64 [S]: `slot_positions` grouped by item, in the row's order within an item"""
    item_offsets: torch.Tensor
    """int32 [U+1]: item unique_items[u] is at the positions item_slots[item_offsets[u]:item_offsets[u+1]]"""
    label_positions: torch.Tensor
    """int64 [L]: positions whose hidden state predicts"""
    labels: torch.Tensor
    """int64 [L]: the answer's tokens, EOS included"""
    sample_of_label: torch.Tensor
    """int64 [L]: which sample of the row a label belongs to"""
    keys: torch.Tensor
    """int64 [N]: the samples' keys"""
    hybrid: torch.Tensor
    """bool [N]"""
    is_empty: bool = False
    """a stand-in without labels that keeps the ranks' passes equal; it must have zero weight in the loss"""

    @property
    def num_tokens(self) -> int:
        """T, the positions computed."""
        return int(self.tokens.shape[0])

    @property
    def num_samples(self) -> int:
        """N, or 0 for the empty stand-in."""
        return 0 if self.is_empty else int(self.keys.shape[0])

    @property
    def answer_tokens(self) -> int:
        """L, the labels."""
        return int(self.labels.shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> Batch:
        tensors: Any = {k: function(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        # By value between processes: torch would spend a file descriptor on each of these small tensors.
        return _rebuild, ({k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()},)


def _rebuild(values: dict[str, Any]) -> Batch:
    fields: Any = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in values.items()}
    return Batch(**fields)


def collate(samples: Sequence[Sample], hybrid: np.ndarray | Sequence[bool], answers: bool = True) -> Batch:
    """Pack samples into one row, in the given order.

    Args:
        samples: at least one.
        hybrid: bool [N]: keep the slots, or take them out.
        answers: False cuts every sample where its answer begins (evaluation); there are no labels then.
    """
    if not samples:
        return empty_batch()
    flags = np.asarray(hybrid, dtype=bool)
    if len(flags) != len(samples):
        raise ValueError(f"{len(samples)} samples, {len(flags)} hybrid flags")
    ends = [sample.answer_end if answers else sample.answer_start for sample in samples]
    tokens = np.concatenate([sample.tokens[:end] for sample, end in zip(samples, ends, strict=True)])
    lengths = np.array(ends, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    slot_counts = np.array([len(sample.slot_positions) for sample in samples], dtype=np.int64)
    slots = _join([sample.slot_positions for sample in samples]) + np.repeat(starts, slot_counts)
    items = _join([sample.slot_items for sample in samples])
    labels, label_counts, label_places = _labels(samples, tokens, starts, answers)
    if not flags.all():
        # The slots of text-only rows go; what stands after them moves up.
        kept_slot = np.repeat(flags, slot_counts)
        keep = np.ones(len(tokens), dtype=bool)
        keep[slots[~kept_slot]] = False
        moved = np.cumsum(keep) - 1
        tokens, slots, items = tokens[keep], moved[slots[kept_slot]], items[kept_slot]
        label_places = moved[label_places]
        lengths = lengths - np.where(flags, 0, slot_counts)
        starts = np.cumsum(lengths) - lengths
    unique, inverse = np.unique(items, return_inverse=True)
    unique = unique if len(unique) else np.zeros(1, dtype=np.int64)
    uses = np.bincount(inverse, minlength=len(unique))
    return Batch(
        tokens=torch.from_numpy(tokens.astype(np.int64)),
        position_ids=torch.from_numpy(np.arange(len(tokens)) - np.repeat(starts, lengths)),
        cu_seqlens=torch.from_numpy(np.append(starts, len(tokens)).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        lengths=tuple(lengths.tolist()),
        answer_lengths=tuple(label_counts.tolist()),
        slot_positions=torch.from_numpy(slots),
        unique_items=torch.from_numpy(unique),
        slot_inverse=torch.from_numpy(inverse.astype(np.int64)),
        item_slots=torch.from_numpy(slots[np.argsort(inverse, kind="stable")]),
        item_offsets=torch.from_numpy(np.append(0, np.cumsum(uses)).astype(np.int32)),
        label_positions=torch.from_numpy(label_places),
        labels=torch.from_numpy(labels),
        sample_of_label=torch.from_numpy(np.repeat(np.arange(len(samples)), label_counts)),
        keys=torch.from_numpy(np.array([sample.key for sample in samples], dtype=np.int64)),
        hybrid=torch.from_numpy(flags.copy()),
    )


def _labels(
    samples: Sequence[Sample], tokens: np.ndarray, starts: np.ndarray, answers: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The answers' tokens, how many each sample has, and the positions that predict them; int64 each."""
    if not answers:
        return np.zeros(0, np.int64), np.zeros(len(samples), np.int64), np.zeros(0, np.int64)
    begins = np.array([sample.answer_start for sample in samples], dtype=np.int64)
    counts = np.array([sample.answer_end for sample in samples], dtype=np.int64) - begins
    places = ranges(starts + begins, counts)
    return tokens[places].astype(np.int64), counts, places - 1


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenate to int64 [n]; nothing gives an empty array."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64)


def empty_batch() -> Batch:
    """A micro-batch without samples: two positions, no labels, item 0 for the projector; its loss must weigh zero."""
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(
        tokens=torch.zeros(2, dtype=torch.int64),
        position_ids=torch.arange(2),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
        max_seqlen=2,
        lengths=(2,),
        answer_lengths=(0,),
        slot_positions=none,
        unique_items=torch.zeros(1, dtype=torch.int64),
        slot_inverse=none,
        item_slots=none,
        item_offsets=torch.zeros(2, dtype=torch.int32),
        label_positions=none,
        labels=none,
        sample_of_label=none,
        keys=torch.zeros(1, dtype=torch.int64),
        hybrid=torch.zeros(1, dtype=torch.bool),
        is_empty=True,
    )
