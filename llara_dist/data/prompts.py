"""Prompts: templates → segments → token ids, slots, answer span, for whole blocks of rows at once.

A prompt is cut only before a space that follows a non-space. There both SentencePiece-BPE and byte-level BPE always
begin a token, so the ids of the segments joined are the ids of the whole string. A segment that shows a title is a
*unit*: " Title" and what follows up to the next cut ("," between titles, the template's own text after the last one),
with the slot right after the token that holds the title's last character. Every unit of a catalogue is tokenised once,
between two anchors that prove its edges; a row is then a gather.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llara_dist.data.samples import Sample
from llara_dist.data.tokenizer import plain_encoder
from llara_dist.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOMAINS = ("movie", "game", "artist")
DEFAULT_MAX_TITLE_TOKENS = 40
"""twenty candidates, one history item and the answer then fit 1,024 tokens whatever the titles"""

_CUT = re.compile(r"(?<=\S) ")
_FIELDS = ("{history}", "{num_candidates}", "{candidates}")
_LEFT, _RIGHT = "a", " a"
"""anchors: a segment is tokenised as _LEFT + segment + _RIGHT, and both must come out as their own tokens"""
_SLOT_ID = 0
"""what a slot's position holds; the model overwrites its embedding"""


@dataclass(frozen=True)
class Template:
    """One wording of the task; text in `templates/<domain>.yaml`.

    The history and the candidates are titles joined by ", "; the answer follows the text after one space.
    """

    text: str

    def __post_init__(self) -> None:
        """Refuse a wording that cannot be cut at spaces; InputError says what is wrong."""
        for field in _FIELDS:
            if self.text.count(field) != 1:
                raise InputError(f"template {self.text!r}: must hold {field} exactly once")
        if self.text.index("{history}") > self.text.index("{candidates}"):
            raise InputError(f"template {self.text!r}: {{history}} must come before {{candidates}}")
        for field in ("{history}", "{candidates}"):
            if not re.search(r"\S " + re.escape(field) + r"(?!\w)", self.text):
                raise InputError(f"template {self.text!r}: {field} must follow a word and one space, and end a word")
        if self.text != self.text.strip():
            raise InputError(f"template {self.text!r}: begins or ends with a space; the answer's space is added")
        if "  " in self.text:
            raise InputError(f"template {self.text!r}: holds a double space")

    def parts(self, num_candidates: int) -> tuple[str, str, str, str, str]:
        """The text between the titles for a number of candidates: (head, history tail, middle, candidate tail, end).

        A tail belongs to the unit of the last title of its list; middle and end begin with a space or are empty.
        """
        text = self.text.replace("{num_candidates}", str(num_candidates))
        head, rest = text.split(" {history}")
        between, after = rest.split(" {candidates}")
        history_tail, middle = _split_tail(between)
        candidate_tail, end = _split_tail(after)
        return head, history_tail, middle, candidate_tail, end

    def render(self, history: Sequence[str], candidates: Sequence[str]) -> str:
        """The text-only prompt, without the answer."""
        text = self.text.replace("{num_candidates}", str(len(candidates)))
        head, rest = text.split("{history}")
        between, after = rest.split("{candidates}")
        return head + ", ".join(history) + between + ", ".join(candidates) + after


def _split_tail(text: str) -> tuple[str, str]:
    """Split the text after a title at its first cut; the title before it counts as a non-space."""
    match = _CUT.search("x" + text)
    return (text, "") if match is None else (text[: match.start() - 1], text[match.start() - 1 :])


def load_templates(domain: str) -> list[Template]:
    """The package's templates of a domain ("movie", "game", "artist"), or those of a YAML file of the same form.

    Raises:
        InputError: an unknown domain, or a file that holds no list `templates` of valid wordings.
    """
    import yaml

    if domain in DOMAINS:
        source = f"templates/{domain}.yaml"
        text = resources.files("llara_dist.data").joinpath(source).read_text(encoding="utf-8")
    else:
        source = domain
        if not Path(domain).is_file():
            raise InputError(f"templates for {domain!r}: neither one of {', '.join(DOMAINS)} nor a YAML file")
        text = Path(domain).read_text(encoding="utf-8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not YAML ({str(error).splitlines()[0]})") from None
    wordings = value.get("templates") if isinstance(value, dict) else None
    if not isinstance(wordings, list) or not wordings or not all(isinstance(wording, str) for wording in wordings):
        raise InputError(f"{source}: expected a list `templates` of texts with {', '.join(_FIELDS)}")
    return [Template(wording) for wording in wordings]


def shown_title(title: str) -> str:
    """A title as prompts show it: runs of white space as one space, none at the ends."""
    return " ".join(title.split())


@dataclass(frozen=True)
class UnitTable:
    """Every piece of every prompt of a catalogue as token ids: plain arrays, no tokenizer needed to use it.

    Unit ids: context c of item i is c * num_items + i (context 0: followed by ","), then the answers (" Title" + EOS),
    then per template the literals head (with BOS), middle and end.
    """

    pool: np.ndarray
    """uint32, all units' ids; a title's unit includes its slot's position"""
    starts: np.ndarray
    """int64 [units]: where a unit begins in the pool"""
    lengths: np.ndarray
    """int64 [units]: positions of a unit"""
    slots: np.ndarray
    """int64 [units]: the slot's position inside the unit, -1 in literals and answers"""
    num_items: int
    num_candidates: int
    history_context: np.ndarray
    """int64 [templates]: context of the last history title"""
    candidate_context: np.ndarray
    """int64 [templates]: context of the last candidate"""
    num_contexts: int

    @property
    def num_templates(self) -> int:
        """How many wordings the table holds."""
        return len(self.history_context)


@dataclass(frozen=True)
class RowBlock:
    """Encoded rows, columnar: what `Sample` holds, one after the other."""

    tokens: np.ndarray
    """uint32 [sum T]"""
    token_offsets: np.ndarray
    """int64 [n+1]"""
    slot_positions: np.ndarray
    """int32 [sum S], counted from the row's start"""
    slot_items: np.ndarray
    title_starts: np.ndarray
    title_lengths: np.ndarray
    slot_offsets: np.ndarray
    """int64 [n+1]"""
    num_history: np.ndarray
    """int64 [n]"""
    target_index: np.ndarray
    answer_start: np.ndarray
    answer_end: np.ndarray
    dropped: np.ndarray
    """int64 [n]: oldest history items left out to fit the token limit"""

    def __len__(self) -> int:
        return len(self.num_history)

    def sample(self, row: int, key: int, pass_index: int) -> Sample:
        """One row as a Sample (views of the block's arrays)."""
        tokens = slice(self.token_offsets[row], self.token_offsets[row + 1])
        slots = slice(self.slot_offsets[row], self.slot_offsets[row + 1])
        return Sample(
            key=key,
            pass_index=pass_index,
            tokens=self.tokens[tokens],
            slot_positions=self.slot_positions[slots],
            slot_items=self.slot_items[slots],
            title_starts=self.title_starts[slots],
            title_lengths=self.title_lengths[slots],
            num_history=int(self.num_history[row]),
            target_index=int(self.target_index[row]),
            answer_start=int(self.answer_start[row]),
            answer_end=int(self.answer_end[row]),
        )


def encode_rows(
    table: UnitTable,
    history_offsets: np.ndarray,
    history_items: np.ndarray,
    candidates: np.ndarray,
    target_index: np.ndarray,
    template_index: np.ndarray,
    max_tokens: int | None = None,
    keys: np.ndarray | None = None,
) -> RowBlock:
    """Encode rows by gathering their units; no tokenizer runs here.

    Args:
        table: the catalogue's units for prompts with `candidates.shape[1]` candidates.
        history_offsets: int64 [n+1] into history_items.
        history_items: int32, oldest first, at least one a row.
        candidates: int32 [n, C] in shown order.
        target_index: int [n], which candidate is the answer.
        template_index: int [n].
        max_tokens: most hybrid positions of a row, EOS included; the oldest history goes first.
        keys: [n], to name a row in an error; its number by default.

    Raises:
        InputError: a row without history, or one that is too long even with one history item (names the row).
    """
    rows, width = candidates.shape
    if width != table.num_candidates:
        raise ValueError(f"the unit table states {table.num_candidates} candidates, the rows hold {width}")
    counts = np.diff(history_offsets)
    if rows and counts.min() < 1:
        raise InputError(f"{_name(keys, int(counts.argmin()))}: no history; a prompt needs at least one item")
    target_index, template_index = target_index.astype(np.int64), template_index.astype(np.int64)

    history_units = history_items[history_offsets[0] : history_offsets[-1]].astype(np.int64)
    ends = np.cumsum(counts)
    history_units[ends - 1] += table.history_context[template_index] * table.num_items
    candidate_units = candidates.astype(np.int64)
    candidate_units[:, -1] += table.candidate_context[template_index] * table.num_items
    targets = candidates[np.arange(rows), target_index].astype(np.int64)
    answer_units = table.num_contexts * table.num_items + targets
    literals = (table.num_contexts + 1) * table.num_items + 3 * template_index

    fixed = table.lengths[candidate_units].sum(1) + table.lengths[answer_units]
    fixed += table.lengths[literals] + table.lengths[literals + 1] + table.lengths[literals + 2]
    first = ends - counts
    if max_tokens is not None and rows:
        used = np.concatenate([[0], np.cumsum(table.lengths[history_units])])
        # The smallest start from which the history up to its end fits the room that the rest leaves.
        kept = np.maximum(np.searchsorted(used, used[ends] - (max_tokens - fixed)), first)
        if (kept >= ends).any():
            row = int(np.flatnonzero(kept >= ends)[0])
            needed = int(fixed[row] + table.lengths[history_units[ends[row] - 1]])
            raise InputError(
                f"{_name(keys, row)}: needs {needed} tokens with one history item left, the limit is {max_tokens}; "
                "raise --max_tokens or lower --max_title_tokens"
            )
    else:
        kept = first
    dropped = kept - first
    counts = counts - dropped

    # The row's units in order: head, history, middle, candidates, end, answer.
    per_row = counts + width + 4
    offsets = np.concatenate([[0], np.cumsum(per_row)])
    units = np.empty(offsets[-1], dtype=np.int64)
    begin = offsets[:-1]
    units[begin] = literals
    ragged = _ranges(counts)
    owner = np.repeat(np.arange(rows), counts)
    history_at = begin[owner] + 1 + ragged
    units[history_at] = history_units[kept[owner] + ragged]
    units[begin + 1 + counts] = literals + 1
    candidates_at = (begin + 2 + counts)[:, None] + np.arange(width)
    units[candidates_at] = candidate_units
    units[offsets[1:] - 2] = literals + 2
    units[offsets[1:] - 1] = answer_units

    lengths = table.lengths[units]
    unit_at = np.concatenate([[0], np.cumsum(lengths)])
    tokens = table.pool[np.repeat(table.starts[units] - unit_at[:-1], lengths) + np.arange(unit_at[-1])]
    token_offsets = unit_at[offsets]

    slot_offsets = np.concatenate([[0], np.cumsum(counts + width)])
    is_slot = np.flatnonzero(table.slots[units] >= 0)
    row_start = np.repeat(token_offsets[:-1], counts + width)
    title_starts = unit_at[is_slot] - row_start
    title_lengths = table.slots[units[is_slot]]
    return RowBlock(
        tokens=tokens,
        token_offsets=token_offsets,
        slot_positions=(title_starts + title_lengths).astype(np.int32),
        slot_items=(units[is_slot] % table.num_items).astype(np.int32),
        title_starts=title_starts.astype(np.int32),
        title_lengths=title_lengths.astype(np.int32),
        slot_offsets=slot_offsets,
        num_history=counts,
        target_index=target_index,
        answer_start=unit_at[offsets[1:] - 1] - token_offsets[:-1],
        answer_end=token_offsets[1:] - token_offsets[:-1],
        dropped=dropped,
    )


def _name(keys: np.ndarray | None, row: int) -> str:
    return f"row {row}" if keys is None else f"key {int(keys[row])}"


def _ranges(counts: np.ndarray) -> np.ndarray:
    """0..counts[0]-1, 0..counts[1]-1, … joined."""
    total = int(counts.sum())
    return np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)


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
                encoding = self._encode([_LEFT + " " + self.shown[item]])[0]
                length = len(encoding.ids) - len(self._left)
        return np.unique(np.array(cut, dtype=np.int64))

    def _encode(self, texts: list[str]) -> list:
        return self._encoder.encode_batch(texts, add_special_tokens=False)

    def _make_table(self, num_candidates: int) -> UnitTable:
        parts = [template.parts(num_candidates) for template in self.templates]
        contexts = [",", *sorted({tail for _, before, _, after, _ in parts for tail in (before, after)} - {","})]
        pieces: list[tuple[list[int], int]] = []
        for context in contexts:
            pieces += self._title_units(context)
        pieces += [([*ids, self.eos], -1) for ids, _ in self._title_units(None)]
        for head, _, middle, _, end in parts:
            pieces.append((self.bos + self._literal(head, first=True), -1))
            pieces += [(self._literal(middle), -1), (self._literal(end), -1)]
        lengths = np.array([len(ids) for ids, _ in pieces], dtype=np.int64)
        return UnitTable(
            pool=np.fromiter((index for ids, _ in pieces for index in ids), dtype=np.uint32, count=int(lengths.sum())),
            starts=np.cumsum(lengths) - lengths,
            lengths=lengths,
            slots=np.array([slot for _, slot in pieces], dtype=np.int64),
            num_items=len(self.shown),
            num_candidates=num_candidates,
            history_context=np.array([contexts.index(part[1]) for part in parts]),
            candidate_context=np.array([contexts.index(part[3]) for part in parts]),
            num_contexts=len(contexts),
        )

    def _title_units(self, context: str | None) -> list[tuple[list[int], int]]:
        """Per item the ids of " Title" + context with the slot's position in it; context None: the answer, no slot."""
        right = "" if context is None else _RIGHT
        texts = [f"{_LEFT} {title}{context or ''}{right}" for title in self.shown]
        units = []
        for title, text, encoding in zip(self.shown, texts, self._encode(texts), strict=True):
            ids = self._between_anchors(encoding.ids, text, bool(right))
            if context is None:
                units.append((ids, -1))
                continue
            title_end = len(_LEFT) + 1 + len(title)
            starts = (start for start, _ in encoding.offsets[len(self._left) : len(self._left) + len(ids)])
            slot = sum(start < title_end for start in starts)
            units.append(([*ids[:slot], _SLOT_ID, *ids[slot:]], slot))
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
