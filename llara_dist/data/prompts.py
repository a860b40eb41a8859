"""Prompts: templates → segments → token ids, slots, answer span, for whole blocks of rows at once.

A prompt is cut only before a space that follows a non-space. There both SentencePiece-BPE and byte-level BPE always
begin a token, so the ids of the segments joined are the ids of the whole string. A segment that shows a title is a
*unit*: " Title" and what follows up to the next cut ("," between titles, the template's own text after the last one),
with the slot right after the token that holds the title's last character. Every unit of a catalogue is tokenised once,
between two anchors that prove its edges; a row is then a gather.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llara_dist.data.samples import Sample
from llara_dist.data.tokenizer import plain_encoder
from llara_dist.data.units import UnitTable, encode_rows
from llara_dist.data.wording import Template
from llara_dist.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_TITLE_TOKENS = 40
"""twenty candidates, one history item and the answer then fit 1,024 tokens whatever the titles"""

_LEFT, _RIGHT = "a", " a"
"""anchors: a segment is tokenised as _LEFT + segment + _RIGHT, and both must come out as their own tokens"""
_SLOT_ID = 0
"""what a slot's position holds; the model overwrites its embedding"""
_TEXTS_PER_BATCH = 4096


def shown_title(title: str) -> str:
    """A title as prompts show it: runs of white space as one space, none at the ends."""
    return " ".join(title.split())


class PromptEncoder:
    """A tokenizer and a catalogue's titles: rows in, token ids with slots out.

    Args:
        tokenizer: any fast tokenizer whose tokens never reach over a space that follows a non-space.
        titles: by item id.
        templates: wordings, e.g. `load_templates("movie")`.
        max_title_tokens: a longer title is cut to so many tokens; None keeps all.

    Raises:
        InputError: an empty title, or a tokenizer that joins segments differently (names the title).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        titles: Sequence[str],
        templates: Sequence[Template],
        max_title_tokens: int | None = DEFAULT_MAX_TITLE_TOKENS,
    ) -> None:
        bos: Any = tokenizer.bos_token_id
        eos: Any = tokenizer.eos_token_id
        if eos is None:
            raise InputError("the tokenizer names no EOS token; a learnt answer needs one")
        self.tokenizer = tokenizer
        self.templates = list(templates)
        self.bos = [] if bos is None else [int(bos)]
        self.eos = int(eos)
        self._encoder = plain_encoder(tokenizer)
        self._left = self._ids(_LEFT)
        self._right = self._ids(_LEFT + _RIGHT)[len(self._left) :]
        self.shown = [shown_title(title) for title in titles]
        for item, title in enumerate(self.shown):
            if not title:
                raise InputError(f"item {item}: its title is empty; give it one in the data set's titles")
        self.cut_items = self._cap_titles(max_title_tokens)
        self._tables: dict[int, UnitTable] = {}

    def table(self, num_candidates: int) -> UnitTable:
        """The catalogue's units for prompts that show so many candidates; made once."""
        if num_candidates not in self._tables:
            self._tables[num_candidates] = self._make_table(num_candidates)
        return self._tables[num_candidates]

    def encode(
        self,
        history: Sequence[int] | np.ndarray,
        candidates: Sequence[int] | np.ndarray,
        target: int,
        template_index: int,
        key: int = 0,
        pass_index: int = 0,
        max_tokens: int | None = None,
    ) -> Sample:
        """Encode one row; `target` is an item id among `candidates`. See `encode_rows` for many."""
        shown = np.asarray(candidates, dtype=np.int32)[None]
        found = np.flatnonzero(shown[0] == target)
        if len(found) != 1:
            raise InputError(f"key {key}: the target {target} must be among the candidates once, found {len(found)}")
        block = encode_rows(
            self.table(shown.shape[1]),
            np.array([0, len(history)]),
            np.asarray(history, dtype=np.int32),
            shown,
            found,
            np.array([template_index]),
            max_tokens,
            np.array([key]),
        )
        return block.sample(0, key, pass_index)

    def text(
        self, history: Sequence[int] | np.ndarray, candidates: Sequence[int] | np.ndarray, template_index: int
    ) -> str:
        """The text-only prompt as one string, without BOS and answer."""
        return self.templates[template_index].render(
            [self.shown[item] for item in history], [self.shown[item] for item in candidates]
        )

    def whole_ids(self, prompt: str, target: int) -> np.ndarray:
        """Ids of the whole string tokenised at once: BOS, prompt, answer, EOS; uint32. What segments must equal."""
        return np.array([*self.bos, *self._ids(f"{prompt} {self.shown[target]}"), self.eos], dtype=np.uint32)

    def _ids(self, text: str) -> list[int]:
        return self._encoder.encode(text, add_special_tokens=False).ids

    def _cap_titles(self, limit: int | None) -> np.ndarray:
        """Cut titles in `shown` to `limit` tokens; returns the items that were cut, int64."""
        if limit is None:
            return np.zeros(0, dtype=np.int64)
        if limit < 1:
            raise InputError(f"max_title_tokens is {limit}; must be at least 1")
        cut = []
        for item, whole in enumerate(self._encode([_LEFT + " " + title for title in self.shown])):
            encoding = whole
            length = len(encoding.ids) - len(self._left)
            while length > limit:
                title = self.shown[item]
                # The first token that is one too many begins at this character; drop at least one character a turn.
                end = min(encoding.offsets[len(self._left) + limit][0] - len(_LEFT) - 1, len(title) - 1)
                if end < 1:
                    raise InputError(
                        f"item {item}: max_title_tokens={limit} does not hold the first character of {title!r}"
                    )
                self.shown[item] = title[:end].rstrip()
                cut.append(item)
                encoding = next(self._encode([_LEFT + " " + self.shown[item]]))
                length = len(encoding.ids) - len(self._left)
        return np.unique(np.array(cut, dtype=np.int64))

    def _encode(self, texts: list[str]) -> Iterator[Any]:
        """Encodings in order; each takes kilobytes, so that a large catalogue's must not be held all at once."""
        for start in range(0, len(texts), _TEXTS_PER_BATCH):
            yield from self._encoder.encode_batch(texts[start : start + _TEXTS_PER_BATCH], add_special_tokens=False)

    def _make_table(self, num_candidates: int) -> UnitTable:
        parts = [template.parts(num_candidates) for template in self.templates]
        contexts = [",", *sorted({tail for _, before, _, after, _ in parts for tail in (before, after)} - {","})]
        pieces: list[tuple[np.ndarray, int]] = []
        for context in contexts:
            pieces += self._title_units(context)
        pieces += self._title_units(None)
        for head, _, middle, _, end in parts:
            literals = [self.bos + self._literal(head, first=True), self._literal(middle), self._literal(end)]
            pieces += [(np.array(ids, dtype=np.uint32), -1) for ids in literals]
        lengths = np.array([len(ids) for ids, _ in pieces], dtype=np.int64)
        return UnitTable(
            pool=np.concatenate([ids for ids, _ in pieces]),
            starts=np.cumsum(lengths) - lengths,
            lengths=lengths,
            slots=np.array([slot for _, slot in pieces], dtype=np.int64),
            num_items=len(self.shown),
            num_candidates=num_candidates,
            history_context=np.array([contexts.index(part[1]) for part in parts]),
            candidate_context=np.array([contexts.index(part[3]) for part in parts]),
            num_contexts=len(contexts),
        )

    def _title_units(self, context: str | None) -> list[tuple[np.ndarray, int]]:
        """Per item the ids (uint32) of " Title" + context and the slot's position in them.

        Context None is the answer: EOS at the end, and -1 for no slot.
        """
        right = "" if context is None else _RIGHT
        texts = [f"{_LEFT} {title}{context or ''}{right}" for title in self.shown]
        units = []
        for title, text, encoding in zip(self.shown, texts, self._encode(texts), strict=True):
            ids = self._between_anchors(encoding.ids, text, bool(right))
            if context is None:
                units.append((np.array([*ids, self.eos], dtype=np.uint32), -1))
                continue
            title_end = len(_LEFT) + 1 + len(title)
            starts = (start for start, _ in encoding.offsets[len(self._left) : len(self._left) + len(ids)])
            slot = sum(start < title_end for start in starts)
            units.append((np.array([*ids[:slot], _SLOT_ID, *ids[slot:]], dtype=np.uint32), slot))
        return units

    def _literal(self, text: str, first: bool = False) -> list[int]:
        """Ids of a template's own text; `first` where nothing stands before it."""
        if not text:
            return []
        if first:
            text += _RIGHT
            ids = self._ids(text)
            if ids[-len(self._right) :] != self._right:
                raise self._joins(text)
            return ids[: -len(self._right)]
        text = _LEFT + text + _RIGHT
        return self._between_anchors(self._ids(text), text, True)

    def _between_anchors(self, ids: list[int], text: str, right: bool) -> list[int]:
        left, tail = len(self._left), len(self._right) if right else 0
        if ids[:left] != self._left or (right and ids[-tail:] != self._right):
            raise self._joins(text)
        return ids[left : len(ids) - tail]

    def _joins(self, text: str) -> InputError:
        return InputError(
            f"tokenizer: its tokens reach over a space in {text[len(_LEFT) :]!r}, so prompts cannot be cut at spaces; "
            "use a SentencePiece-BPE or byte-level BPE tokenizer"
        )
