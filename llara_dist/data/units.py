"""Units of prompts as plain arrays, and rows as gathers of them: no tokenizer runs where rows are encoded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llara_dist.data.rows import ranges
from llara_dist.data.samples import Sample
from llara_dist.errors import InputError


@dataclass(frozen=True)
class UnitTable:
    """Every piece of every prompt of a catalogue as token ids: plain arrays, no tokenizer needed to use it.

    Unit ids: context c of item i is c * num_items + i (context 0: followed by ","), then the answers (" Title" + EOS),
    then per template the literals head (with BOS), middle and end.
    """

    pool: np.ndarray
    """uint32, all units' ids; a title's unit includes its slot's position"""
    starts: np.ndarray
    """int64 [units]: where a unit begins in the pool"""
    lengths: np.ndarray
    """int64 [units]: positions of a unit"""
    slots: np.ndarray
    """int64 [units]: the slot's position inside the unit, -1 in literals and answers"""
    num_items: int
    num_candidates: int
    history_context: np.ndarray
    """int64 [templates]: context of the last history title"""
    candidate_context: np.ndarray
    """int64 [templates]: context of the last candidate"""
    num_contexts: int

    @property
    def num_templates(self) -> int:
        """How many wordings the table holds."""
        return len(self.history_context)


@dataclass(frozen=True)
class RowBlock:
    """Encoded rows, columnar: what `Sample` holds, one after the other."""

    tokens: np.ndarray
    """uint32 [sum T]"""
    token_offsets: np.ndarray
    """int64 [n+1]"""
    slot_positions: np.ndarray
    """int32 [sum S], counted from the row's start"""
    slot_items: np.ndarray
    title_starts: np.ndarray
    title_lengths: np.ndarray
    slot_offsets: np.ndarray
    """int64 [n+1]"""
    num_history: np.ndarray
    """int64 [n]"""
    target_index: np.ndarray
    answer_start: np.ndarray
    answer_end: np.ndarray
    dropped: np.ndarray
    """int64 [n]: oldest history items left out to fit the token limit"""

    def __len__(self) -> int:
        return len(self.num_history)

    def sample(self, row: int, key: int, pass_index: int) -> Sample:
        """One row as a Sample (views of the block's arrays)."""
        tokens = slice(self.token_offsets[row], self.token_offsets[row + 1])
        slots = slice(self.slot_offsets[row], self.slot_offsets[row + 1])
        return Sample(
            key=key,
            pass_index=pass_index,
            tokens=self.tokens[tokens],
            slot_positions=self.slot_positions[slots],
            slot_items=self.slot_items[slots],
            title_starts=self.title_starts[slots],
            title_lengths=self.title_lengths[slots],
            num_history=int(self.num_history[row]),
            target_index=int(self.target_index[row]),
            answer_start=int(self.answer_start[row]),
            answer_end=int(self.answer_end[row]),
        )


def encode_rows(
    table: UnitTable,
    history_offsets: np.ndarray,
    history_items: np.ndarray,
    candidates: np.ndarray,
    target_index: np.ndarray,
    template_index: np.ndarray,
    max_tokens: int | None = None,
    keys: np.ndarray | None = None,
) -> RowBlock:
    """Encode rows by gathering their units; no tokenizer runs here.

    Args:
        table: the catalogue's units for prompts with `candidates.shape[1]` candidates.
        history_offsets: int64 [n+1] into history_items.
        history_items: int32, oldest first, at least one a row.
        candidates: int32 [n, C] in shown order.
        target_index: int [n], which candidate is the answer.
        template_index: int [n].
        max_tokens: most hybrid positions of a row, EOS included; the oldest history goes first.
        keys: [n], to name a row in an error; its number by default.

    Raises:
        InputError: a row without history, or one that is too long even with one history item (names the row).
    """
    rows, width = candidates.shape
    if width != table.num_candidates:
        raise ValueError(f"the unit table states {table.num_candidates} candidates, the rows hold {width}")
    counts = np.diff(history_offsets)
    if rows and counts.min() < 1:
        raise InputError(f"{_name(keys, int(counts.argmin()))}: no history; a prompt needs at least one item")
    target_index, template_index = target_index.astype(np.int64), template_index.astype(np.int64)

    history_units = history_items[history_offsets[0] : history_offsets[-1]].astype(np.int64)
    ends = np.cumsum(counts)
    history_units[ends - 1] += table.history_context[template_index] * table.num_items
    candidate_units = candidates.astype(np.int64)
    candidate_units[:, -1] += table.candidate_context[template_index] * table.num_items
    targets = candidates[np.arange(rows), target_index].astype(np.int64)
    answer_units = table.num_contexts * table.num_items + targets
    literals = (table.num_contexts + 1) * table.num_items + 3 * template_index

    fixed = table.lengths[candidate_units].sum(1) + table.lengths[answer_units]
    fixed += table.lengths[literals] + table.lengths[literals + 1] + table.lengths[literals + 2]
    first = ends - counts
    if max_tokens is not None and rows:
        used = np.concatenate([[0], np.cumsum(table.lengths[history_units])])
        # The smallest start from which the history up to its end fits the room that the rest leaves.
        kept = np.maximum(np.searchsorted(used, used[ends] - (max_tokens - fixed)), first)
        if (kept >= ends).any():
            row = int(np.flatnonzero(kept >= ends)[0])
            needed = int(fixed[row] + table.lengths[history_units[ends[row] - 1]])
            raise InputError(
                f"{_name(keys, row)}: needs {needed} tokens with one history item left, the limit is {max_tokens}; "
                "raise --max_tokens or lower --max_title_tokens"
            )
    else:
        kept = first
    dropped = kept - first
    counts = counts - dropped

    # The row's units in order: head, history, middle, candidates, end, answer.
    per_row = counts + width + 4
    offsets = np.concatenate([[0], np.cumsum(per_row)])
    units = np.empty(offsets[-1], dtype=np.int64)
    begin = offsets[:-1]
    units[begin] = literals
    ragged = ranges(np.zeros(rows, dtype=np.int64), counts)
    owner = np.repeat(np.arange(rows), counts)
    history_at = begin[owner] + 1 + ragged
    units[history_at] = history_units[kept[owner] + ragged]
    units[begin + 1 + counts] = literals + 1
    candidates_at = (begin + 2 + counts)[:, None] + np.arange(width)
    units[candidates_at] = candidate_units
    units[offsets[1:] - 2] = literals + 2
    units[offsets[1:] - 1] = answer_units

    lengths = table.lengths[units]
    unit_at = np.concatenate([[0], np.cumsum(lengths)])
    tokens = table.pool[np.repeat(table.starts[units] - unit_at[:-1], lengths) + np.arange(unit_at[-1])]
    token_offsets = unit_at[offsets]

    slot_offsets = np.concatenate([[0], np.cumsum(counts + width)])
    is_slot = np.flatnonzero(table.slots[units] >= 0)
    row_start = np.repeat(token_offsets[:-1], counts + width)
    title_starts = unit_at[is_slot] - row_start
    title_lengths = table.slots[units[is_slot]]
    return RowBlock(
        tokens=tokens,
        token_offsets=token_offsets,
        slot_positions=(title_starts + title_lengths).astype(np.int32),
        slot_items=(units[is_slot] % table.num_items).astype(np.int32),
        title_starts=title_starts.astype(np.int32),
        title_lengths=title_lengths.astype(np.int32),
        slot_offsets=slot_offsets,
        num_history=counts,
        target_index=target_index,
        answer_start=unit_at[offsets[1:] - 1] - token_offsets[:-1],
        answer_end=token_offsets[1:] - token_offsets[:-1],
        dropped=dropped,
    )


def _name(keys: np.ndarray | None, row: int) -> str:
    return f"row {row}" if keys is None else f"key {int(keys[row])}"
