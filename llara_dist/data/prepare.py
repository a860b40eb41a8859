"""`llara-dist prepare`: a recipe and raw logs → a dataset folder, with an audit for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llara_dist.console import say, table
from llara_dist.data.audit import audit
from llara_dist.data.candidates import draw_candidates
from llara_dist.data.dataset import SPLITS, write_dataset
from llara_dist.data.exclusions import row_exclusions, touched_items
from llara_dist.data.filters import filter_log
from llara_dist.data.llara_folders import FILES, NOTE, read_llara
from llara_dist.data.log import Log
from llara_dist.data.movielens import read_movielens
from llara_dist.data.recipes import LlaraSource, MovieLensSource, Recipe, SyntheticSource, find_recipe, load_recipe
from llara_dist.data.rows import RowSource, chunks
from llara_dist.data.sequences import make_sequences
from llara_dist.data.tables import TableSource, read_tables
from llara_dist.data.titles import clean_titles
from llara_dist.errors import InputError

EXCLUSION_NOTE = (
    "Candidates of a row exclude everything its user ever interacted with, before and after the window, also events "
    "that make no sequence (low ratings, repeats)."
)
_ROWS_DRAWN = 1 << 16
"""rows whose candidates are drawn at once; a row's exclusions may be thousands of items"""


def prepare(recipe: str, out: Path, raw: Path | None = None) -> dict[str, Any]:
    """Turn raw logs into a dataset folder: windows, splits, clean titles, frozen candidates, an audit.

    Args:
        recipe: a built-in recipe (movielens, steam, lastfm, synthetic) or the path of a recipe file (.yaml).
        out: the dataset folder to make; it must not exist or be empty.
        raw: folder with the raw files that the recipe reads.

    Returns:
        name, out, hash, counts, audit and notes, as in dataset.json.

    Raises:
        InputError: bad recipe or raw files; nothing is left at `out` then.
    """
    file = find_recipe(recipe)
    loaded = load_recipe(file)
    if raw is None and isinstance(loaded.source, TableSource) and recipe.endswith((".yaml", ".yml")):
        raw = file.parent
    return prepare_dataset(loaded, Path(out), None if raw is None else Path(raw))


def prepare_dataset(recipe: Recipe, out: Path, raw: Path | None = None) -> dict[str, Any]:
    """`prepare` with the recipe given as an object."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; remove it or choose another --out")
    say(f"{recipe.name}: reading {raw or 'the synthetic world'} and cutting windows")
    log, splits, counts, notes = _read(recipe, raw)
    titles, title_report = clean_titles(log.titles, recipe.titles, recipe.domain, log.item_ids)
    log = replace(log, titles=titles)
    say(f"{recipe.name}: drawing candidates and auditing {sum(map(len, splits.values())):,} rows")
    candidates = _frozen_candidates(log, splits, recipe)
    found = audit(log, splits, title_report, recipe.sequences.max_history)
    info = write_dataset(
        out,
        name=recipe.name,
        log=log,
        splits=splits,
        candidates=candidates,
        recipe=recipe.as_json(),
        max_history=recipe.sequences.max_history,
        min_history=recipe.sequences.min_history,
        counts=counts,
        audit=found,
        notes=notes,
    )
    _show(info, out)
    return {
        "name": recipe.name,
        "out": str(out),
        "hash": info["hash"],
        "counts": info["counts"],
        "audit": found,
        "notes": notes,
    }


def _read(recipe: Recipe, raw: Path | None) -> tuple[Log, Mapping[str, RowSource], dict[str, int], list[str]]:
    source, rules = recipe.source, recipe.sequences
    if isinstance(source, SyntheticSource):
        if raw is not None:
            raise InputError("the synthetic world is made, not read: leave --raw out")
        log, read_counts = _synthetic(source, recipe.domain), {}
    elif raw is None:
        raise InputError(f"recipe {recipe.name}: needs --raw, the folder with the raw files")
    elif not raw.is_dir():
        raise InputError(f"{raw}: no such folder; --raw names the folder with the raw files")
    elif isinstance(source, TableSource):
        log, read_counts = read_tables(raw, source, recipe.domain)
    elif isinstance(source, LlaraSource) or _holds_llara(raw):
        log, splits, counts = read_llara(raw, recipe.domain, rules.min_history, rules.max_history)
        return log, splits, counts, [NOTE]
    else:
        assert isinstance(source, MovieLensSource)
        log, read_counts = read_movielens(raw, source.min_rating, source.drop_first_line), {}
    log, filter_counts = filter_log(log, recipe.filters)
    splits, counts = make_sequences(log, rules)
    return log, splits, {**read_counts, **filter_counts, **counts}, [EXCLUSION_NOTE]


def _holds_llara(raw: Path) -> bool:
    """Whether a folder that might be the publisher's or LLaRA's MovieLens is LLaRA's."""
    llara, publisher = (raw / FILES["train"]).exists(), (raw / "u.data").exists()
    if llara and publisher:
        raise InputError(f"{raw}: holds both u.data and {FILES['train']}; give each its own folder")
    if not llara and not publisher:
        raise InputError(f"{raw}: holds neither u.data (MovieLens) nor {FILES['train']} (LLaRA)")
    return llara


def _synthetic(source: SyntheticSource, domain: str) -> Log:
    from llara_dist.data.synthetic import synthetic_world

    try:
        world = synthetic_world(**source.settings)
    except TypeError as error:
        raise InputError(f"source.settings: {error}; see llara_dist.data.synthetic.synthetic_world") from None
    return Log(
        users=world.users.astype(np.int32),
        items=world.items.astype(np.int32),
        timestamps=world.timestamps.astype(np.int64),
        titles=list(world.titles),
        domain=domain,
    )


def _frozen_candidates(log: Log, splits: Mapping[str, RowSource], recipe: Recipe) -> dict[str, np.ndarray]:
    touched = touched_items(log.users, log.items, log.num_items)
    rules = recipe.candidates
    drawn = {}
    for name in ("val", "test"):
        parts = []
        for rows in chunks(splits[name], _ROWS_DRAWN):
            offsets, items = row_exclusions(rows, *touched, 0, len(rows))
            parts.append(
                draw_candidates(rows.keys, rows.targets, offsets, items, log.num_items, rules.count, rules.seed, draw=0)
            )
        drawn[name] = np.concatenate(parts)
    return drawn


def _show(info: dict[str, Any], out: Path) -> None:
    """Print the audit."""
    counts, found = info["counts"], info["audit"]
    rows = [
        [
            name,
            f"{counts[name]:,}",
            f"{counts[f'{name}_dropped_short']:,}",
            f"{found['rows'][name]['mean_history']:.2f}",
            f"{found['rows'][name]['equal_rows']:,}",
            f"{found['rows'][name]['target_in_history']:,}",
            f"{counts[f'{name}_target_time_tied']:,}" if f"{name}_target_time_tied" in counts else "unknown",
        ]
        for name in SPLITS
    ]
    columns = ["split", "rows", "too short", "mean history", "equal rows", "target in history", "target tied in time"]
    table(f"{info['name']}: {counts['items']:,} items, {counts['interactions']:,} events", columns, rows)
    leaks = [
        [pair, "unknown" if leak["users_in_both"] is None else leak["users_in_both"], leak["equal_rows_in_both"]]
        for pair, leak in found["leakage"].items()
    ]
    table("leakage between splits", ["splits", "users in both", "equal rows in both"], leaks)
    titles, events = found["titles"], found["events"]
    say(
        f"titles: {titles['years_dropped']} years dropped, {titles['articles_moved']} articles moved, "
        f"{titles['empty_or_unknown']} empty or unknown, {titles['collisions']} colliding in "
        f"{titles['colliding_groups']} groups, of which {titles['told_apart_by_year']} told apart by year, "
        f"{titles['told_apart_by_number']} by number"
    )
    if events["events"]:
        say(
            f"events: {events['first_event']} to {events['last_event']}, "
            f"{events['duplicate_user_item_time']} duplicates (user, item, time), "
            f"{events['repeated_user_item']} repeats (user, item), {events['used_events_tied_in_time']} tied in time"
        )
    for note in info["notes"]:
        say(f"note: {note}")
    say(f"wrote {out}, hash {info['hash'][:16]}")
