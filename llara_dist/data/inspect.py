"""`llara-dist shards inspect`: one sample as a person can read it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llara_dist import console
from llara_dist.data import shards as form
from llara_dist.data.samples import Sample, unpack
from llara_dist.data.shard_index import REMEDY, ShardIndex
from llara_dist.data.tokenizer import load_tokenizer, tokenizer_hash
from llara_dist.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def inspect_sample(
    shards: Path, key: int, split: str | None = None, pass_index: int = 0, tokenizer: str | None = None
) -> dict[str, Any]:
    """Print one sample of the shards: the prompt in both forms, its slots, its answer.

    Example: llara-dist shards inspect shards/out/movielens --key 12

    Args:
        shards: shards folder, made by `llara-dist shards build`.
        key: the row's key in the dataset folder.
        split: train, val or test; by default the one that holds the key.
        pass_index: which draw of template and candidates.
        tokenizer: folder or hub id, if it no longer lies where the build found it.

    Raises:
        InputError: no such sample, a damaged one, or a tokenizer other than the one the shards were built with.
    """
    shards = Path(shards)
    info = form.read_shards_info(shards)
    loaded = matching_tokenizer(info, tokenizer)
    found, sample = find_sample(shards, info, key, split, pass_index)
    titles = shown_titles(shards, info)
    hybrid, text_only = readable(sample, loaded)
    answer = loaded.decode(sample.tokens[sample.answer_start : sample.answer_end].tolist())
    slots = [
        [
            "history" if number < sample.num_history else "candidate",
            int(position),
            int(item),
            titles[item],
            int(length),
            "← answer" if number == sample.num_history + sample.target_index else "",
        ]
        for number, (position, item, length) in enumerate(
            zip(sample.slot_positions, sample.slot_items, sample.title_lengths, strict=True)
        )
    ]
    lengths = {
        "hybrid_tokens": len(sample.tokens),
        "text_tokens": len(sample.tokens) - len(sample.slot_positions),
        "answer_tokens": sample.answer_end - sample.answer_start,
    }
    console.say(f"key {key}, pass {sample.pass_index}, {found}")
    console.say(f"\ntext-only form ({lengths['text_tokens']} tokens)\n{text_only}")
    console.say(f"\nhybrid form ({lengths['hybrid_tokens']} tokens, ⟨item i⟩ = one behaviour token)\n{hybrid}")
    console.say(f"\nanswer ({lengths['answer_tokens']} tokens, learnt)\n{answer}\n")
    console.table("slots", ["kind", "position", "item", "title", "title tokens", ""], slots)
    return {
        "key": key,
        "pass": sample.pass_index,
        "split": found,
        "text_only": text_only,
        "hybrid": hybrid,
        "answer": answer,
        "history": sample.history.tolist(),
        "candidates": sample.candidates.tolist(),
        "target": sample.target,
        **lengths,
    }


def matching_tokenizer(info: dict[str, Any], tokenizer: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a shards folder and check that it is the one.

    Raises:
        InputError: it cannot be loaded, or its hash is not the shards'.
    """
    source = tokenizer or info["tokenizer"]
    loaded = load_tokenizer(source)
    if tokenizer_hash(loaded) != info["tokenizer_hash"]:
        raise InputError(
            f"{source}: not the tokenizer that the shards were built with ({info['tokenizer']}); "
            "give that one by --tokenizer, or rebuild the shards"
        )
    return loaded


def find_sample(
    shards: Path, info: dict[str, Any], key: int, split: str | None = None, pass_index: int = 0
) -> tuple[str, Sample]:
    """The split that holds (key, pass) and its sample, crc32 checked.

    Raises:
        InputError: nothing there, or damaged (names shard, offset and key).
    """
    splits = [split] if split else list(info["splits"])
    for name in splits:
        manifest = form.read_manifest(shards, name, info)
        index = form.read_index(shards / name, manifest)
        for number, shard in enumerate(manifest["shards"]):
            if shard["pass"] != pass_index:
                continue
            rows = index.shard(number)
            found = np.flatnonzero(rows.keys == key)
            if len(found):
                return name, _read_sample(shards / name / shard["name"], rows, int(found[0]))
    counts = ", ".join(f"{name} {info['splits'][name]['samples']}" for name in splits)
    raise InputError(f"{shards}: no sample with key {key} in pass {pass_index}; samples there: {counts}")


def _read_sample(path: Path, rows: ShardIndex, row: int) -> Sample:
    offset, size = int(rows.offsets[row]), int(rows.sizes[row])
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            payload = file.read(size)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; {REMEDY}") from None
    problem = form.payload_problem(payload, size, int(rows.crc32[row]))
    if problem:
        raise InputError(f"{path}: sample at offset {offset}, key {int(rows.keys[row])}: {problem}; {REMEDY}")
    return unpack(payload)


def shown_titles(shards: Path, info: dict[str, Any] | None = None) -> list[str]:
    """By item id, the titles as the prompts show them (white space tidied, cut at the cap).

    Args:
        shards: shards folder.
        info: its shards.json, if that has been read.

    Raises:
        InputError: items.parquet is missing or altered.
    """
    info = form.read_shards_info(shards) if info is None else info
    return read_shown_titles(Path(shards) / form.ITEMS, info)


def read_shown_titles(path: Path, info: dict[str, Any]) -> list[str]:
    """`shown_titles` from a given copy of items.parquet."""
    import pyarrow.parquet as pq

    problem = form.file_problem(path, info["items_bytes"], info["items_sha256"])
    if problem:
        raise InputError(f"{path}: {problem}; {REMEDY}")
    return pq.read_table(path, columns=["shown"])["shown"].to_pylist()


def readable(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The sample's text in the hybrid form, slots as ⟨item i⟩, and in the text-only form; both with BOS and EOS."""
    is_text = np.ones(len(sample.tokens), dtype=bool)
    is_text[sample.slot_positions] = False
    text = str(tokenizer.decode(sample.tokens[is_text].tolist()))
    hybrid, done = "", 0
    for position, item in zip(sample.slot_positions.tolist(), sample.slot_items.tolist(), strict=True):
        # Where the slot stands in the text: as far as the tokens before it reach (single tokens decode differently).
        here = len(tokenizer.decode(sample.tokens[:position][is_text[:position]].tolist()))
        hybrid += f"{text[done:here]}⟨item {item}⟩"
        done = here
    return hybrid + text[done:], text
