"""One training sample and its bytes: msgpack around raw little-endian arrays, so that reading it costs no parsing."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgpack
import numpy as np

from llara_dist.errors import InputError

_TOKEN, _PLACE = np.dtype("<u4"), np.dtype("<i4")
ARRAYS = {
    "tokens": _TOKEN,
    "slot_positions": _PLACE,
    "slot_items": _PLACE,
    "title_starts": _PLACE,
    "title_lengths": _PLACE,
}


class Sample(NamedTuple):
    """One (history, candidates, target) row as token ids of the hybrid prompt.

    The text-only form is the same row with the slot positions taken out; evaluation cuts it at `answer_start`.
    """

    key: int
    """the row's key in the dataset folder"""
    pass_index: int
    """which draw of template and training candidates"""
    tokens: np.ndarray
    """uint32 [T]: BOS, prompt, answer, EOS; each slot holds one valid id whose value never matters"""
    slot_positions: np.ndarray
    """int32 [S], increasing: history slots first, then candidates in shown order"""
    slot_items: np.ndarray
    """int32 [S]: item ids"""
    title_starts: np.ndarray
    """int32 [S]: first token of each slot's title"""
    title_lengths: np.ndarray
    """int32 [S]: tokens of each slot's title; it ends where the slot stands"""
    num_history: int
    """how many of the slots are history"""
    target_index: int
    """which candidate is the target, counted from 0 in shown order"""
    answer_start: int
    """first position of the answer"""
    answer_end: int
    """one past EOS"""

    @property
    def candidates(self) -> np.ndarray:
        """int32 [C]: candidate items in shown order."""
        return self.slot_items[self.num_history :]

    @property
    def history(self) -> np.ndarray:
        """int32 [H]: history items, oldest first."""
        return self.slot_items[: self.num_history]

    @property
    def target(self) -> int:
        """The item id that the answer names."""
        return int(self.candidates[self.target_index])


def pack(sample: Sample) -> bytes:
    """A sample's bytes: one msgpack map of integers and raw little-endian arrays."""
    record: dict[str, int | bytes] = {
        "key": sample.key,
        "pass": sample.pass_index,
        "num_history": sample.num_history,
        "target_index": sample.target_index,
        "answer_start": sample.answer_start,
        "answer_end": sample.answer_end,
    }
    for name, dtype in ARRAYS.items():
        record[name] = np.ascontiguousarray(getattr(sample, name), dtype=dtype).tobytes()
    packed: Any = msgpack.packb(record)
    return packed


def unpack(data: bytes) -> Sample:
    """Read back what `pack` wrote; the arrays are read-only views of `data`.

    Raises:
        InputError: the bytes are no sample of this format (the caller adds shard, offset and key).
    """
    try:
        record = msgpack.unpackb(data)
        # Spelled out: this runs for every sample of every epoch.
        return Sample(
            key=int(record["key"]),
            pass_index=int(record["pass"]),
            tokens=np.frombuffer(record["tokens"], _TOKEN),
            slot_positions=np.frombuffer(record["slot_positions"], _PLACE),
            slot_items=np.frombuffer(record["slot_items"], _PLACE),
            title_starts=np.frombuffer(record["title_starts"], _PLACE),
            title_lengths=np.frombuffer(record["title_lengths"], _PLACE),
            num_history=int(record["num_history"]),
            target_index=int(record["target_index"]),
            answer_start=int(record["answer_start"]),
            answer_end=int(record["answer_end"]),
        )
    except (msgpack.UnpackException, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise InputError(f"not a sample of this format ({problem})")
