"""What is drawn for rows: template and candidates from (seed, pass, key), then the rows as tokens.

Workers share what they need for it as files that each maps into memory: nothing of it is copied per process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from llara_dist.data.candidates import draw_candidates
from llara_dist.data.exclusions import row_exclusions
from llara_dist.data.rows import Rows
from llara_dist.data.units import RowBlock, UnitTable, encode_rows
from llara_dist.hashing import hash64, text_seed

_TEMPLATE = text_seed("llara_dist/shards/template")


@dataclass(frozen=True)
class Drawing:
    """What a worker needs besides its rows: the unit table and the settings of the draws."""

    table: UnitTable
    seed: int
    max_tokens: int
    touched_offsets: np.ndarray
    """int64 [users + 1]: CSR by user of all items touched, which may not be negatives"""
    touched_items: np.ndarray

    def save(self, folder: Path) -> None:
        """Write the arrays as .npy files into a new folder, to be mapped by `Drawing.open`."""
        folder.mkdir()
        values = {**vars(self), **vars(self.table)}
        del values["table"]
        numbers = {}
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                np.save(folder / f"{name}.npy", value, allow_pickle=False)
            else:
                numbers[name] = value
        (folder / "numbers.json").write_text(json.dumps(numbers))

    @classmethod
    def open(cls, folder: Path) -> Drawing:
        """Map what `save` wrote; the pages are shared by all processes of the machine."""
        values = json.loads((folder / "numbers.json").read_text())
        for path in folder.glob("*.npy"):
            small = path.stat().st_size < 4096  # may hold no value at all, and nothing cannot be mapped
            values[path.stem] = np.asarray(np.load(path, mmap_mode=None if small else "r", allow_pickle=False))
        table = UnitTable(**{item.name: values.pop(item.name) for item in fields(UnitTable)})
        return cls(table=table, **values)


def draw_rows(
    rows: Rows, candidates: np.ndarray | None, drawing: Drawing, pass_index: int
) -> tuple[RowBlock, np.ndarray]:
    """Draw template and candidates of rows and encode them; returns the block and candidates int32 [n, C]."""
    table = drawing.table
    if candidates is None:
        offsets, items = row_exclusions(rows, drawing.touched_offsets, drawing.touched_items, 0, len(rows))
        candidates = draw_candidates(
            rows.keys, rows.targets, offsets, items, table.num_items, table.num_candidates, drawing.seed, pass_index
        )
    templates = draw_templates(rows.keys, drawing.seed, pass_index, table.num_templates)
    target_index = (candidates == rows.targets[:, None]).argmax(axis=1)
    block = encode_rows(
        table, rows.offsets, rows.items, candidates, target_index, templates, drawing.max_tokens, rows.keys
    )
    return block, candidates


def draw_templates(keys: np.ndarray, seed: int, pass_index: int, num_templates: int) -> np.ndarray:
    """Which wording each row gets in a pass, int64 [n]."""
    return (hash64(_TEMPLATE, seed, pass_index, keys) % np.uint64(num_templates)).astype(np.int64)
