"""Read a pickled pandas frame without pandas and without running what the pickle asks for.

A pickle names callables and the stock unpickler calls them, so a pickle from elsewhere is never given to it. Here
each global that a frame of plain numpy columns needs is mapped to an inert stand-in (`frame_stand_ins`); every other
global is refused before anything is called. What remains to a crafted file is to waste memory.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist.data.frame_stand_ins import (
    ALLOWED,
    Array,
    ArrowStringArray,
    Block,
    Frame,
    Manager,
    NewIndex,
    Slice,
    StringArray,
    Unreadable,
)
from llara_dist.errors import InputError


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> type:
        try:
            return ALLOWED[module, name]
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
    except Unreadable as error:
        raise InputError(
            f"{path}: a pickle of an unknown form ({error}); save it again with pandas 2, or as Parquet and use a "
            "csv recipe"
        ) from None
    except Exception as error:  # a damaged pickle may fail in any way, and whatever it is, it is the file's fault
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: not a readable pickle ({type(error).__name__}: {reason})") from None


def _columns(frame: Any) -> dict[str, np.ndarray]:
    if not isinstance(frame, Frame) or not isinstance(frame.state, dict):
        raise Unreadable("not a DataFrame")
    manager = frame.state.get("_mgr")
    if not isinstance(manager, Manager) or len(manager.args) != 2:
        raise Unreadable("a DataFrame without blocks, written by a pandas before 1.3 or another library")
    blocks, axes = manager.args
    names = _index_values(axes[0])
    columns: dict[str, np.ndarray] = {}
    for block in blocks:
        if not isinstance(block, Block) or len(block.args) != 3 or not isinstance(block.args[0], Array):
            raise Unreadable("a column that is no plain numpy array")
        values = block.args[0].numpy()
        places = _placement(block.args[1])
        if values.ndim != 2 or len(values) != len(places):
            raise Unreadable("a block whose columns do not match its values")
        for place, column in zip(places, values, strict=True):
            columns[names[place]] = column
    if len({len(column) for column in columns.values()}) > 1 or len(columns) != len(names):
        raise Unreadable("columns of different lengths, or missing ones")
    return columns


def _placement(where: Any) -> Sequence[int]:
    if isinstance(where, Array):
        return [int(place) for place in where.numpy()]
    if isinstance(where, Slice) and len(where.args) == 3 and all(isinstance(part, int) for part in where.args):
        return range(*where.args)  # never listed: a crafted one may be endless
    raise Unreadable("a block at an unknown place")


def _index_values(index: Any) -> list[str]:
    if isinstance(index, NewIndex) and len(index.args) == 2 and isinstance(index.args[1], dict):
        data = index.args[1].get("data")
        if isinstance(data, Array):
            return [str(name) for name in data.numpy()]
        if isinstance(data, StringArray | ArrowStringArray):
            return data.texts()
    raise Unreadable("column names of an unknown form")
