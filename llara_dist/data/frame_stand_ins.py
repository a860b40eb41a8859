"""What the globals of a pickled pandas frame become when `frame_pickle` reads it: inert records of their arguments.

No real numpy or pandas function is reachable from a pickle, so a crafted dtype or array state ends in a checked
conversion here, not in numpy's own (unchecked) `__setstate__`.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

_DTYPES = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f2", "f4", "f8", "b1", "O8", "O4", "O"}


class Unreadable(Exception):
    """The pickle is allowed but has a form this reader does not know."""


class StandIn:
    """What an allowed global becomes. `__setstate__` on every one keeps BUILD from setting attributes on a class."""

    __slots__ = ("args", "state")

    def __new__(cls, *args: Any) -> Any:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Frame(StandIn):
    __slots__ = ()


class Manager(StandIn):
    __slots__ = ()


class Block(StandIn):
    __slots__ = ()


class Index(StandIn):
    __slots__ = ()


class RangeIndex(StandIn):
    __slots__ = ()


class NewIndex(StandIn):
    __slots__ = ()


class Slice(StandIn):
    __slots__ = ()


class Dtype(StandIn):
    __slots__ = ()

    def numpy(self) -> np.dtype:
        """The plain numpy dtype this stands for."""
        code = self.args[0] if self.args else None
        if code not in _DTYPES:
            raise Unreadable(f"an array of dtype {code!r}")
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "="
        if order not in ("<", ">", "=", "|"):
            raise Unreadable(f"an array of byte order {order!r}")
        return np.dtype(object) if code.startswith("O") else np.dtype(code).newbyteorder(order)


class Array(StandIn):
    """numpy.ndarray, through `_reconstruct` + state or through `_frombuffer`."""

    __slots__ = ()

    def numpy(self) -> np.ndarray:
        """The array this stands for, of a plain dtype, or of objects."""
        if isinstance(self.state, tuple) and len(self.state) == 5:
            _, shape, dtype, fortran, data = self.state
        elif len(self.args) == 4 and self.state is None:
            data, dtype, shape, order = self.args
            fortran = order == "F"
        else:
            raise Unreadable("an array whose state is of an unknown form")
        shape = shape if isinstance(shape, tuple) else (shape,)
        if not isinstance(dtype, Dtype) or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise Unreadable("an array without a plain dtype and shape")
        plain = dtype.numpy()
        if plain.kind == "O":
            if not isinstance(data, list) or len(data) != prod(shape):
                raise Unreadable("an array of objects whose length does not match its shape")
            out = np.empty(len(data), dtype=object)
            out[:] = data if not data or not isinstance(data[0], list | tuple) else _as_objects(data)
            return out.reshape(shape)
        if not isinstance(data, bytes | bytearray) or len(data) != prod(shape) * plain.itemsize:
            raise Unreadable("an array whose bytes do not match its shape")
        return np.frombuffer(bytes(data), dtype=plain).reshape(shape, order="F" if fortran else "C")


class StringArray(StandIn):
    """pandas 3's column names without pyarrow: state (dtype, array of objects)."""

    __slots__ = ()

    def texts(self) -> list[str]:
        """The texts this stands for."""
        arrays = [part for part in self.state or () if isinstance(part, Array)]
        if len(arrays) != 1:
            raise Unreadable("column names of an unknown form")
        return [str(name) for name in arrays[0].numpy()]


class ArrowStringArray(StandIn):
    """pandas 3's column names with pyarrow: one array of large strings, offsets and bytes."""

    __slots__ = ()

    def texts(self) -> list[str]:
        """The texts this stands for."""
        try:
            (_, length, nulls, start, (_, offsets, data), *_) = self.state["_pa_array"].args[0]
            ends = np.frombuffer(_buffer(offsets), dtype="<i8")[start : start + length + 1].tolist()
            raw = _buffer(data)
            if nulls or len(ends) != length + 1:
                raise ValueError
            return [raw[begin:end].decode() for begin, end in pairwise(ends)]
        except (TypeError, ValueError, KeyError, AttributeError):
            raise Unreadable("column names of an unknown form") from None


class _ArrowPart(StandIn):
    __slots__ = ()


class _Bytes(StandIn):
    """builtins.bytearray(bytes), from protocols that have no opcode for it."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], bytes):
            return args[0]
        raise Unreadable("a byte array of an unknown form")


def _buffer(part: Any) -> bytes:
    """The bytes of pyarrow's `py_buffer(bytes)`."""
    return bytes(part.args[0])


class _Encode(StandIn):
    """`_codecs.encode(text, "latin1")`, the bytes of protocols before 3."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> Any:
        if len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
            return args[0].encode("latin-1")
        raise Unreadable("bytes of an unknown form")


class _NdarrayBacked(StandIn):
    __slots__ = ()

    def __new__(cls, *args: Any) -> Any:
        if not args or args[0] is not StringArray:
            raise Unreadable("a column that is no plain numpy array")
        return StringArray()


class _Reconstruct(StandIn):
    """numpy's `_reconstruct(ndarray, shape, typecode)`: an empty array that BUILD fills."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> Any:
        return Array()


class _Scalar(StandIn):
    """numpy's `scalar(dtype, bytes)` → a Python number."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> Any:
        if len(args) == 2 and isinstance(args[0], Dtype) and isinstance(args[1], bytes):
            dtype = args[0].numpy()
            if dtype.kind in "iub" and len(args[1]) == dtype.itemsize:
                order = "big" if dtype.str[0] == ">" else "little"
                return int.from_bytes(args[1], order, signed=dtype.kind == "i")
            if dtype.kind == "f" and len(args[1]) == dtype.itemsize:
                return float(np.frombuffer(args[1], dtype)[0])
        raise Unreadable("a numpy scalar of an unknown form")


def _as_objects(values: list[Any]) -> np.ndarray:
    out = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):  # assigning the list at once would unpack equal-length lists
        out[place] = value
    return out


ALLOWED: dict[tuple[str, str], type] = {
    ("pandas.core.frame", "DataFrame"): Frame,
    ("pandas", "DataFrame"): Frame,
    ("pandas", "Index"): Index,
    ("pandas", "RangeIndex"): RangeIndex,
    ("pandas", "StringDtype"): StandIn,
    ("pandas.arrays", "StringArray"): StringArray,
    ("pandas.arrays", "ArrowStringArray"): ArrowStringArray,
    ("pandas._libs.arrays", "__pyx_unpickle_NDArrayBacked"): _NdarrayBacked,
    **{("pyarrow.lib", name): _ArrowPart for name in ("_restore_array", "type_for_alias", "py_buffer")},
    ("pandas.core.internals.managers", "BlockManager"): Manager,
    ("pandas.core.internals", "BlockManager"): Manager,
    ("pandas._libs.internals", "_unpickle_block"): Block,
    ("pandas.core.internals.blocks", "new_block"): Block,
    ("pandas.core.indexes.base", "_new_Index"): NewIndex,
    ("pandas.core.indexes.base", "Index"): Index,
    ("pandas.core.indexes.numeric", "Int64Index"): Index,
    ("pandas.core.indexes.range", "RangeIndex"): RangeIndex,
    ("builtins", "slice"): Slice,
    ("__builtin__", "slice"): Slice,
    ("builtins", "bytearray"): _Bytes,
    ("_codecs", "encode"): _Encode,
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): Dtype,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _Reconstruct),
            ("multiarray", "scalar", _Scalar),
            ("numeric", "_frombuffer", Array),
        )
    },
}
