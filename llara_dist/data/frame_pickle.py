"""Read a pickled pandas frame without pandas and without running what the pickle asks for.

A pickle names callables and the stock unpickler calls them, so a pickle from elsewhere is never given to it. Here
each global that a frame of plain numpy columns needs is mapped to an inert stand-in defined below; every other
global is refused before anything is called. No real numpy or pandas function is reachable, so a crafted dtype or
array state ends in a checked conversion, not in numpy's own (unchecked) `__setstate__`.
"""

from __future__ import annotations

import pickle
from io import BytesIO
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist.errors import InputError

_DTYPES = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f2", "f4", "f8", "b1", "O8", "O4", "O"}


class _Unreadable(Exception):
    """The pickle is allowed but has a form this reader does not know."""


class _StandIn:
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


class _Frame(_StandIn):
    __slots__ = ()


class _Manager(_StandIn):
    __slots__ = ()


class _Block(_StandIn):
    __slots__ = ()


class _Index(_StandIn):
    __slots__ = ()


class _RangeIndex(_StandIn):
    __slots__ = ()


class _NewIndex(_StandIn):
    __slots__ = ()


class _Slice(_StandIn):
    __slots__ = ()


class _Dtype(_StandIn):
    __slots__ = ()

    def numpy(self) -> np.dtype:
        """The plain numpy dtype this stands for."""
        code = self.args[0] if self.args else None
        if code not in _DTYPES:
            raise _Unreadable(f"an array of dtype {code!r}")
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "="
        if order not in ("<", ">", "=", "|"):
            raise _Unreadable(f"an array of byte order {order!r}")
        return np.dtype(object) if code.startswith("O") else np.dtype(code).newbyteorder(order)


class _Array(_StandIn):
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
            raise _Unreadable("an array whose state is of an unknown form")
        shape = shape if isinstance(shape, tuple) else (shape,)
        if not isinstance(dtype, _Dtype) or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise _Unreadable("an array without a plain dtype and shape")
        plain = dtype.numpy()
        if plain.kind == "O":
            if not isinstance(data, list) or len(data) != prod(shape):
                raise _Unreadable("an array of objects whose length does not match its shape")
            out = np.empty(len(data), dtype=object)
            out[:] = data if not data or not isinstance(data[0], list | tuple) else _as_objects(data)
            return out.reshape(shape)
        if not isinstance(data, bytes | bytearray) or len(data) != prod(shape) * plain.itemsize:
            raise _Unreadable("an array whose bytes do not match its shape")
        return np.frombuffer(bytes(data), dtype=plain).reshape(shape, order="F" if fortran else "C")


class _StringArray(_StandIn):
    """pandas 3's column names without pyarrow: state (dtype, array of objects)."""

    __slots__ = ()

    def texts(self) -> list[str]:
        """The texts this stands for."""
        arrays = [part for part in self.state or () if isinstance(part, _Array)]
        if len(arrays) != 1:
            raise _Unreadable("column names of an unknown form")
        return [str(name) for name in arrays[0].numpy()]


class _ArrowStringArray(_StandIn):
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
            raise _Unreadable("column names of an unknown form") from None


class _ArrowPart(_StandIn):
    __slots__ = ()


class _Bytes(_StandIn):
    """builtins.bytearray(bytes), from protocols that have no opcode for it."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], bytes):
            return args[0]
        raise _Unreadable("a byte array of an unknown form")


def _buffer(part: Any) -> bytes:
    """The bytes of pyarrow's `py_buffer(bytes)`."""
    return bytes(part.args[0])


class _Encode(_StandIn):
    """`_codecs.encode(text, "latin1")`, the bytes of protocols before 3."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> Any:
        if len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
            return args[0].encode("latin-1")
        raise _Unreadable("bytes of an unknown form")


class _NdarrayBacked(_StandIn):
    __slots__ = ()

    def __new__(cls, *args: Any) -> Any:
        if not args or args[0] is not _StringArray:
            raise _Unreadable("a column that is no plain numpy array")
        return _StringArray()


class _Reconstruct(_StandIn):
    """numpy's `_reconstruct(ndarray, shape, typecode)`: an empty array that BUILD fills."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> Any:
        return _Array()


class _Scalar(_StandIn):
    """numpy's `scalar(dtype, bytes)` → a Python number."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> Any:
        if len(args) == 2 and isinstance(args[0], _Dtype) and isinstance(args[1], bytes):
            dtype = args[0].numpy()
            if dtype.kind in "iub" and len(args[1]) == dtype.itemsize:
                order = "big" if dtype.str[0] == ">" else "little"
                return int.from_bytes(args[1], order, signed=dtype.kind == "i")
            if dtype.kind == "f" and len(args[1]) == dtype.itemsize:
                return float(np.frombuffer(args[1], dtype)[0])
        raise _Unreadable("a numpy scalar of an unknown form")


def _as_objects(values: list[Any]) -> np.ndarray:
    out = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):  # assigning the list at once would unpack equal-length lists
        out[place] = value
    return out


_ALLOWED: dict[tuple[str, str], type] = {
    ("pandas.core.frame", "DataFrame"): _Frame,
    ("pandas", "DataFrame"): _Frame,
    ("pandas", "Index"): _Index,
    ("pandas", "RangeIndex"): _RangeIndex,
    ("pandas", "StringDtype"): _StandIn,
    ("pandas.arrays", "StringArray"): _StringArray,
    ("pandas.arrays", "ArrowStringArray"): _ArrowStringArray,
    ("pandas._libs.arrays", "__pyx_unpickle_NDArrayBacked"): _NdarrayBacked,
    **{("pyarrow.lib", name): _ArrowPart for name in ("_restore_array", "type_for_alias", "py_buffer")},
    ("pandas.core.internals.managers", "BlockManager"): _Manager,
    ("pandas.core.internals", "BlockManager"): _Manager,
    ("pandas._libs.internals", "_unpickle_block"): _Block,
    ("pandas.core.internals.blocks", "new_block"): _Block,
    ("pandas.core.indexes.base", "_new_Index"): _NewIndex,
    ("pandas.core.indexes.base", "Index"): _Index,
    ("pandas.core.indexes.numeric", "Int64Index"): _Index,
    ("pandas.core.indexes.range", "RangeIndex"): _RangeIndex,
    ("builtins", "slice"): _Slice,
    ("__builtin__", "slice"): _Slice,
    ("builtins", "bytearray"): _Bytes,
    ("_codecs", "encode"): _Encode,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _Reconstruct),
            ("multiarray", "scalar", _Scalar),
            ("numeric", "_frombuffer", _Array),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> type:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            # `repr` keeps a name with line breaks from forging a second line of the message.
            raise InputError(
                f"{self._path}: refused, the pickle asks for {f'{module}.{name}'!r}, which is not one of the few "
                "pandas and numpy names a table of numbers needs; do not open this file with pandas either if you do "
                "not trust its origin"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise InputError(f"{self._path}: refused, the pickle refers to an object outside the file")


def read_frame(path: Path) -> dict[str, np.ndarray]:
    """Read the columns of a pandas frame saved with `DataFrame.to_pickle`, uncompressed, by pandas 1.3 to 3.

    Nothing in the file is run: see the module's docstring.

    Args:
        path: the pickle.

    Returns:
        Column name → array [rows]: numeric, or of Python objects (lists, tuples, numbers, text).

    Raises:
        InputError: the file is missing, asks for a global that is not allowed, is damaged, or is a frame of a form
            that this reader does not know.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a pickled pandas frame") from None
    try:
        frame = _Unpickler(data, path).load()
        return _columns(frame)
    except InputError:
        raise
    except _Unreadable as error:
        raise InputError(
            f"{path}: a pickle of an unknown form ({error}); save it again with pandas 2, or as Parquet and use a "
            "csv recipe"
        ) from None
    except Exception as error:  # a damaged pickle may fail in any way, and whatever it is, it is the file's fault
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: not a readable pickle ({type(error).__name__}: {reason})") from None


def _columns(frame: Any) -> dict[str, np.ndarray]:
    if not isinstance(frame, _Frame) or not isinstance(frame.state, dict):
        raise _Unreadable("not a DataFrame")
    manager = frame.state.get("_mgr")
    if not isinstance(manager, _Manager) or len(manager.args) != 2:
        raise _Unreadable("a DataFrame without blocks, written by a pandas before 1.3 or another library")
    blocks, axes = manager.args
    names = _index_values(axes[0])
    columns: dict[str, np.ndarray] = {}
    for block in blocks:
        if not isinstance(block, _Block) or len(block.args) != 3 or not isinstance(block.args[0], _Array):
            raise _Unreadable("a column that is no plain numpy array")
        values = block.args[0].numpy()
        places = _placement(block.args[1])
        if values.ndim != 2 or len(values) != len(places):
            raise _Unreadable("a block whose columns do not match its values")
        for place, column in zip(places, values, strict=True):
            columns[names[place]] = column
    if len({len(column) for column in columns.values()}) > 1 or len(columns) != len(names):
        raise _Unreadable("columns of different lengths, or missing ones")
    return columns


def _placement(where: Any) -> list[int]:
    if isinstance(where, _Array):
        return [int(place) for place in where.numpy()]
    if isinstance(where, _Slice) and len(where.args) == 3 and all(isinstance(part, int) for part in where.args):
        return list(range(*where.args))
    raise _Unreadable("a block at an unknown place")


def _index_values(index: Any) -> list[str]:
    if isinstance(index, _NewIndex) and len(index.args) == 2 and isinstance(index.args[1], dict):
        data = index.args[1].get("data")
        if isinstance(data, _Array):
            return [str(name) for name in data.numpy()]
        if isinstance(data, _StringArray | _ArrowStringArray):
            return data.texts()
    raise _Unreadable("column names of an unknown form")
