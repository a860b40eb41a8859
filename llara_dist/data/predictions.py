"""Predictions of an evaluation as one Parquet file: a row each, what was shown, said and scored, and the verdicts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from llara_dist.errors import InputError


@dataclass(frozen=True)
class Predictions:
    """One evaluation's rows in the order of their keys. Parts that were not asked for are None."""

    keys: np.ndarray
    """uint64 [n]"""
    targets: np.ndarray
    """int32 [n], item ids"""
    candidates: np.ndarray
    """int32 [n, C], in shown order"""
    generated: list[str] | None
    """the answers as text"""
    finished: np.ndarray | None
    """bool [n], whether the answer ended with EOS within the limit"""
    exact_valid: np.ndarray | None
    """bool [n], and so the next three"""
    exact_hit: np.ndarray | None
    published_valid: np.ndarray | None
    published_hit: np.ndarray | None
    log_likelihoods: np.ndarray | None
    """float64 [n, C], nats, of each candidate's title as the answer, EOS included"""
    answer_tokens: np.ndarray | None
    """int32 [n, C], how many tokens that is"""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def target_index(self) -> np.ndarray:
        """int64 [n], the target's place among the candidates."""
        return (self.candidates == self.targets[:, None]).argmax(axis=1)


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write the Parquet file; columns are the fields' names, parts that are None are left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {}
    for field in fields(predictions):
        value = getattr(predictions, field.name)
        if isinstance(value, np.ndarray) and value.ndim == 2:
            offsets = np.arange(len(value) + 1, dtype=np.int32) * value.shape[1]
            columns[field.name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(value.reshape(-1)))
        elif value is not None:
            columns[field.name] = pa.array(value, pa.string()) if isinstance(value, list) else pa.array(value)
    pq.write_table(pa.table(columns), path, compression="zstd", store_schema=False)


def read_predictions(path: Path) -> Predictions:
    """Read back what `write_predictions` wrote.

    Raises:
        InputError: missing, unreadable, or without the columns every prediction has.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise InputError(f"{path}: not found; expected predictions made by `llara-dist evaluate`") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
    values = {}
    for field in fields(Predictions):
        if field.name not in table.column_names:
            if field.name in ("keys", "targets", "candidates"):
                raise InputError(f"{path}: column {field.name!r} is missing; not made by `llara-dist evaluate`")
            values[field.name] = None
            continue
        column = table[field.name].combine_chunks()
        if pa.types.is_list(column.type):
            values[field.name] = column.values.to_numpy().reshape(len(table), -1)
        elif pa.types.is_string(column.type):
            values[field.name] = column.to_pylist()
        else:
            values[field.name] = column.to_numpy(zero_copy_only=False)
    return Predictions(**values)
