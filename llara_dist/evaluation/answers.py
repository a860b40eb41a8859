"""Titles as answers: the tokens that training taught for each item, and the text that generated tokens stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llara_dist.data.prompts import PromptEncoder
from llara_dist.data.samples import Sample
from llara_dist.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answer_tokens(tokenizer: PreTrainedTokenizerBase, titles: Sequence[str]) -> list[np.ndarray]:
    """By item id, the answer's token ids as shards hold them: one space, the title, EOS.

    Args:
        tokenizer: the model's.
        titles: by item id, as prompts show them.

    Returns:
        uint32 arrays, EOS last.
    """
    table = PromptEncoder(tokenizer, titles, templates=[], max_title_tokens=None).table(num_candidates=1)
    first = table.num_contexts * table.num_items
    starts, lengths = (array[first : first + len(titles)].tolist() for array in (table.starts, table.lengths))
    return [table.pool[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def check_answer(sample: Sample, answers: Sequence[np.ndarray]) -> None:
    """The shards' answer of a sample is the one that would be scored for its target.

    Raises:
        InputError: it is not; the shards' titles and samples do not belong together.
    """
    taught = sample.tokens[sample.answer_start : sample.answer_end]
    if not np.array_equal(taught, answers[sample.target]):
        raise InputError(
            f"sample with key {sample.key}: its answer is not item {sample.target}'s title in tokens; "
            "items.parquet and samples do not belong together: rebuild with `llara-dist shards build`"
        )


def answer_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of generated tokens, special ones left out, nothing tidied but the ends."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text.strip()
