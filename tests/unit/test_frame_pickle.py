"""The frame reader: frames of pandas 1.5, 2.2 and 3.1 are read, and no pickle can make it run anything.

`frames/*.df` were written with `DataFrame.to_pickle` by the pandas in their name: six rows of `seq` (three items,
padding 12), `len_seq` and `next`; shuffled ones went through `df[...].sample(...)`, pairs hold (id, rating) tuples.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara_dist.data.frame_pickle import read_frame
from llara_dist.errors import InputError

FRAMES = Path(__file__).parent / "frames"
SEQ = [[item, item * 3 % 12, item * 5 % 12] + [12] * 7 for item in range(6)]
NEXT = [(item + 7) % 12 for item in range(6)]


@pytest.mark.parametrize("name", sorted(path.name for path in FRAMES.glob("*.df")))
def test_frames_of_every_pandas(name: str) -> None:
    frame = read_frame(FRAMES / name)
    assert sorted(frame) == ["len_seq", "next", "seq"]
    seq, following = frame["seq"].tolist(), frame["next"].tolist()
    if "pairs" in name:
        assert all(rating == 5 for _, rating in following)
        seq, following = [[item for item, _ in row] for row in seq], [item for item, _ in following]
    assert sorted(zip(seq, following, strict=True)) == sorted(zip(SEQ, NEXT, strict=True))
    assert frame["len_seq"].tolist() == [3] * 6


def test_the_fixtures_are_there() -> None:
    assert len(list(FRAMES.glob("*.df"))) == 8


class _Calls:
    """Pickles to a call of `function(*args)`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def _refused(path: Path, data: bytes, *parts: str) -> None:
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_frame(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(path), *parts):
        assert part in message


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {}",), "system"),
        (eval, ("open({!r}, 'w')",), "eval"),
        (exec, ("open({!r}, 'w')",), "exec"),
        (getattr, ("{}", "upper"), "getattr"),
        (subprocess.check_output, (["touch", "{}"],), "check_output"),
        (__import__, ("os",), "__import__"),
        (open, ("{}", "w"), "open"),
    ],
)
def test_unsafe_globals_are_refused_and_not_run(
    tmp_path: Path, protocol: int, function: Any, arguments: tuple[Any, ...], named: str
) -> None:
    proof = tmp_path / "proof"
    filled = [
        [part.format(proof) for part in argument] if isinstance(argument, list) else argument.format(str(proof))
        for argument in arguments
    ]
    call = _Calls(function, *filled)
    for value in (call, [1, {"seq": (call,)}], {"a": np.arange(3), "b": call}):
        _refused(tmp_path / "train_data.df", pickle.dumps(value, protocol), "refused", named)
    assert not proof.exists()
    assert pickle.loads(pickle.dumps(_Calls(len, "ab"), protocol)) == 2  # the harness itself does call


def test_call_hidden_in_a_real_frame(tmp_path: Path) -> None:
    """A valid frame first, then a call whose result is thrown away."""
    proof = tmp_path / "proof"
    frame = (FRAMES / "pandas2.df").read_bytes()
    command = f"touch {proof}".encode()
    call = b"cposix\nsystem\n(V" + command + b"\ntR0"
    _refused(tmp_path / "x.df", frame[:-1] + call + b".", "refused", "posix.system")
    _refused(tmp_path / "x.df", b"\x80\x04" + call + frame[2:], "refused", "posix.system")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numpy", "load"),
        ("numpy", "ndarray.tofile"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy.testing._private.utils", "runstring"),
        ("pandas.io.pickle", "read_pickle"),
        ("pandas", "eval"),
        ("pandas.core.frame", "DataFrame.eval"),
        ("builtins", "slice.__class__.__base__"),
        ("builtins", "getattr"),
        ("builtins", "object"),
        ("copyreg", "_reconstructor"),
        ("_codecs", "lookup"),
    ],
)
def test_neighbours_of_allowed_names_are_refused(tmp_path: Path, module: str, name: str) -> None:
    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    _refused(tmp_path / "x.df", b"\x80\x04" + text(module) + text(name) + b"\x93.", "refused", f"{module}.{name}")


def test_other_ways_in(tmp_path: Path) -> None:
    path = tmp_path / "x.df"
    _refused(path, b"\x80\x02Vabc\nQ.", "outside the file")  # a persistent id
    _refused(path, b"(S'touch x'\nios\nsystem\n.", "refused", "os.system")  # INST
    _refused(path, b"\x80\x02\x82\x01.", "not a readable pickle")  # an extension code
    # A line break in the name must not make a second line of the message.
    _refused(path, b"\x80\x04\x8c\x05a\nOKb\x8c\x01b\x93.", "refused", "a\\nOKb")


def test_stand_ins_cannot_be_changed(tmp_path: Path) -> None:
    """BUILD on a class would set attributes on it for every later file; setting none is what keeps it inert."""
    from llara_dist.data import frame_stand_ins

    before = {name: dict(vars(kind)) for name, kind in vars(frame_stand_ins).items() if isinstance(kind, type)}
    frame = (b"\x8c\x06pandas", b"\x8c\x09DataFrame", b"\x93")
    state = b"N}\x8c\x0b__reduce__X\x8c\x01xs\x86b."
    _refused(tmp_path / "x.df", b"\x80\x04" + b"".join(frame) + state, "not a readable pickle")
    state = b"}\x8c\x01a\x8c\x01xsb."
    _refused(tmp_path / "x.df", b"\x80\x04" + b"".join(frame) + state, "not a readable pickle")
    after = {name: dict(vars(kind)) for name, kind in vars(frame_stand_ins).items() if isinstance(kind, type)}
    assert after == before


@pytest.mark.parametrize("protocol", [2, 5])
def test_other_objects_are_an_unknown_form(tmp_path: Path, protocol: int) -> None:
    _refused(tmp_path / "x.df", pickle.dumps([1, 2], protocol), "unknown form", "not a DataFrame")
    if protocol == 5:
        _refused(tmp_path / "x.df", pickle.dumps(np.arange(4), protocol), "unknown form", "not a DataFrame")


def test_damaged_files(tmp_path: Path) -> None:
    whole = (FRAMES / "pandas1_pairs.df").read_bytes()
    for size in (0, 1, 10, 500, len(whole) - 1):
        _refused(tmp_path / "x.df", whole[:size], "x.df")
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(2, len(data))] = rng.integers(256)
        (tmp_path / "x.df").write_bytes(data)
        try:
            read_frame(tmp_path / "x.df")
        except InputError as error:  # anything else that is raised fails the test
            messages.append(str(error))
    assert len(messages) > 30
    assert not any("\n" in message for message in messages)
    with pytest.raises(InputError, match="No such file"):
        read_frame(tmp_path / "none.df")


def test_crafted_array_states_are_checked(tmp_path: Path) -> None:
    """A shape that does not fit the bytes, and a dtype that is not plain, never reach numpy."""
    data = (FRAMES / "pandas2_shuffled.df").read_bytes()
    shape = b"K\x02K\x06\x86"  # (2, 6) of the int64 block
    assert data.count(shape) == 1
    _refused(tmp_path / "x.df", data.replace(shape, b"K\x02K\x07\x86"), "unknown form", "do not match its shape")
    assert data.count(b"\x8c\x02i8") == 1
    _refused(tmp_path / "x.df", data.replace(b"\x8c\x02i8", b"\x8c\x02V8"), "unknown form", "'V8'")
    _refused(tmp_path / "x.df", b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b".", "not a readable pickle")
