"""Samples: bytes and back, and bytes that are none."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from llara_dist.data.samples import ARRAYS, Sample, pack, unpack
from llara_dist.errors import InputError


def sample(**changes) -> Sample:
    values = {
        "key": 2**40 + 3,
        "pass_index": 4,
        "tokens": np.array([1, 70_000, 0, 5, 0, 9, 2], dtype=np.uint32),
        "slot_positions": np.array([2, 4], dtype=np.int32),
        "slot_items": np.array([11, 12], dtype=np.int32),
        "title_starts": np.array([1, 3], dtype=np.int32),
        "title_lengths": np.array([1, 1], dtype=np.int32),
        "num_history": 1,
        "target_index": 0,
        "answer_start": 5,
        "answer_end": 7,
    }
    return Sample(**{**values, **changes})


def test_bytes_and_back():
    before = sample()
    after = unpack(pack(before))
    for name, value in before._asdict().items():
        if isinstance(value, np.ndarray):
            assert getattr(after, name).dtype == value.dtype
            np.testing.assert_array_equal(getattr(after, name), value)
        else:
            assert getattr(after, name) == value
    assert (after.target, after.history.tolist(), after.candidates.tolist()) == (12, [11], [12])


def test_bytes_do_not_depend_on_the_machine():
    big_endian = sample(tokens=sample().tokens.astype(">u4"), slot_items=sample().slot_items.astype(">i8"))
    assert pack(big_endian) == pack(sample())
    record = msgpack.unpackb(pack(sample()))
    assert record["tokens"] == b"".join(int(token).to_bytes(4, "little") for token in sample().tokens)
    assert set(ARRAYS) < set(record)


@pytest.mark.parametrize("length", [0, 1, 10, -1])
def test_cut_bytes_are_refused(length):
    with pytest.raises(InputError, match="not a sample"):
        unpack(pack(sample())[:length])


def test_other_records_are_refused():
    record = msgpack.unpackb(pack(sample()))
    for broken in (
        {**record, "tokens": record["tokens"][:-1]},
        {**record, "tokens": [1, 2, 3]},
        {**record, "key": None},
        {name: value for name, value in record.items() if name != "slot_items"},
        [1, 2],
    ):
        with pytest.raises(InputError, match="not a sample"):
            unpack(msgpack.packb(broken))
