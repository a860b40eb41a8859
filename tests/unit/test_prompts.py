"""Prompts: segments joined are the whole string's ids; caps, limits and counts hold."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llara_dist.data.prompts import PromptEncoder, shown_title
from llara_dist.data.tokenizer import load_tokenizer, plain_encoder, tokenizer_hash
from llara_dist.data.units import encode_rows
from llara_dist.data.wording import Template, load_templates
from llara_dist.errors import InputError

from . import worlds

KINDS = ["gpt2", "llama3", "no-bos", "sentencepiece"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = worlds.sentencepiece_folder(tmp_path_factory.mktemp("sentencepiece"))
    return {
        "gpt2": worlds.byte_level(worlds.GPT2_SPLIT),
        "llama3": worlds.byte_level(worlds.LLAMA3_SPLIT),
        "no-bos": worlds.byte_level(bos=False),
        "sentencepiece": load_tokenizer(folder),
    }


@pytest.fixture(params=KINDS)
def encoder(request, tokenizers) -> PromptEncoder:
    return PromptEncoder(tokenizers[request.param], worlds.titles(), load_templates("movie"), None)


def text_only(sample) -> np.ndarray:
    return np.delete(sample.tokens, sample.slot_positions)


def draw(rng, num_items: int, num_candidates: int = 20):
    chosen = rng.permutation(num_items)[: num_candidates + 10]
    history = chosen[num_candidates : num_candidates + rng.integers(1, 11)]
    return history, chosen[:num_candidates], int(chosen[rng.integers(num_candidates)])


def test_segments_are_the_whole_string(encoder):
    rng = np.random.default_rng(0)
    for _ in range(100):
        history, candidates, target = draw(rng, 60)
        for template in range(3):
            sample = encoder.encode(history, candidates, target, template)
            whole = encoder.whole_ids(encoder.text(history, candidates, template), target)
            np.testing.assert_array_equal(text_only(sample), whole)


def test_each_awkward_title_in_each_place(encoder):
    plain = list(range(35, 59))
    for item in range(len(worlds.AWKWARD)):
        for template in range(3):
            for history, candidates in (
                ([item, 30], plain[:4]),
                ([30, item], plain[:4]),
                ([30, 31], [item, *plain[:3]]),
                ([30, 31], [*plain[:3], item]),
            ):
                sample = encoder.encode(history, candidates, candidates[-1], template)
                whole = encoder.whole_ids(encoder.text(history, candidates, template), candidates[-1])
                np.testing.assert_array_equal(text_only(sample), whole)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=24).filter(lambda text: text.split()), min_size=6, max_size=6))
@pytest.mark.parametrize("kind", KINDS)
def test_any_titles(kind, tokenizers, texts):
    encoder = PromptEncoder(tokenizers[kind], texts, load_templates("game"), None)
    for template in range(3):
        sample = encoder.encode([0, 1, 2], [3, 4, 5], 4, template)
        whole = encoder.whole_ids(encoder.text([0, 1, 2], [3, 4, 5], template), 4)
        np.testing.assert_array_equal(text_only(sample), whole)


def test_slots_follow_their_titles(encoder):
    rng = np.random.default_rng(1)
    decode = encoder.tokenizer.decode
    for _ in range(20):
        history, candidates, target = draw(rng, 60)
        sample = encoder.encode(history, candidates, target, 0)
        np.testing.assert_array_equal(sample.slot_items, [*history, *candidates])
        assert (np.diff(sample.slot_positions) > 0).all()
        assert sample.target == target
        for item, start, length, slot in zip(
            sample.slot_items, sample.title_starts, sample.title_lengths, sample.slot_positions, strict=True
        ):
            assert start + length == slot
            shown = decode(sample.tokens[start:slot].tolist()).strip()
            # The title's last token may hold punctuation that follows it, and no more than that.
            assert re.fullmatch(re.escape(encoder.shown[item]) + r"[,.?]*", shown), (shown, encoder.shown[item])
            without_last = decode(sample.tokens[start : slot - 1].tolist()).strip()
            assert not without_last.startswith(encoder.shown[item])


def test_answer_and_ends(encoder):
    sample = encoder.encode([0, 1, 2], [3, 4, 5, 6], 5, 1)
    tokenizer = encoder.tokenizer
    assert sample.answer_end == len(sample.tokens)
    assert sample.tokens[-1] == tokenizer.eos_token_id
    answer = sample.tokens[sample.answer_start : sample.answer_end - 1].tolist()
    assert tokenizer.decode(answer).strip() == encoder.shown[5]
    assert (text_only(sample) == tokenizer.eos_token_id).sum() == 1
    if tokenizer.bos_token_id is not None:
        assert sample.tokens[0] == tokenizer.bos_token_id
        assert (text_only(sample) == tokenizer.bos_token_id).sum() == 1


def test_special_token_text_in_a_title_is_text(encoder):
    item = worlds.AWKWARD.index("</s>")
    other = worlds.AWKWARD.index("<|endoftext|> <s>")
    sample = encoder.encode([item, other], [0, item, other], 0, 0)
    special = {encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id}
    assert not special & set(text_only(sample)[1:-1].tolist())


def test_states_the_true_number_of_candidates(encoder):
    for number in (2, 5, 20):
        candidates = list(range(number))
        for template in range(3):
            text = encoder.templates[template].render(["H"], ["C"] * number)
            assert re.findall(r"\d+", text) == [str(number)]
            text = encoder.text([40, 41], candidates, template)
            sample = encoder.encode([40, 41], candidates, 0, template)
            np.testing.assert_array_equal(text_only(sample), encoder.whole_ids(text, 0))


def test_templates_of_every_domain_are_sound():
    for domain in ("movie", "game", "artist"):
        templates = load_templates(domain)
        assert len(templates) == 3
        assert len({template.text for template in templates}) == 3
        for template in templates:
            head, history_tail, middle, candidate_tail, end = template.parts(7)
            joined = f"{head} H{history_tail}{middle} C{candidate_tail}{end}"
            assert joined == template.render(["H"], ["C"]).replace(" 1 ", " 7 ").replace(" 1:", " 7:")
            assert "7" in joined
            assert not joined.endswith(" ")


@pytest.mark.parametrize(
    "text",
    [
        "no fields",
        "{history} first {num_candidates} {candidates}",
        "A {candidates} {num_candidates} {history} B",
        "A {history}{candidates} {num_candidates}",
        "A {history} {num_candidates} ({candidates})",
        "A {history} {num_candidates} {candidates} ",
        "A {history}  {num_candidates} {candidates}.",
    ],
)
def test_unsound_templates_are_refused(text):
    with pytest.raises(InputError, match="template"):
        Template(text)


def test_own_template_file(tmp_path, tokenizers):
    file = tmp_path / "own.yaml"
    file.write_text('templates: ["Seen {history}\\nChoices ({num_candidates}): {candidates}\\n\\nNext:"]')
    for kind in KINDS:
        encoder = PromptEncoder(tokenizers[kind], worlds.titles(), load_templates(str(file)), None)
        for item in range(30):
            sample = encoder.encode([31, item], [40, 41, item], 40, 0)
            whole = encoder.whole_ids(encoder.text([31, item], [40, 41, item], 0), 40)
            np.testing.assert_array_equal(text_only(sample), whole)
    file.write_text("templates: 3")
    with pytest.raises(InputError, match=r"own.yaml"):
        load_templates(str(file))
    with pytest.raises(InputError, match="neither one of"):
        load_templates("book")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [3, 8])
def test_long_titles_are_cut(kind, cap, tokenizers):
    titles = [*worlds.titles(), "Supercalifragilistic " * 300, "😀" * 50, "無" * 50]
    encoder = PromptEncoder(tokenizers[kind], titles, load_templates("movie"), max_title_tokens=max(cap, 4))
    full = PromptEncoder(tokenizers[kind], titles, load_templates("movie"), None)
    ids = plain_encoder(tokenizers[kind])
    anchor = len(ids.encode("a", add_special_tokens=False).ids)
    for item, title in enumerate(encoder.shown):
        assert title
        assert full.shown[item].startswith(title)
        assert len(ids.encode("a " + title, add_special_tokens=False).ids) - anchor <= max(cap, 4)
        assert (title != full.shown[item]) == (item in encoder.cut_items)
    assert {60, 61, 62} <= set(encoder.cut_items.tolist())
    sample = encoder.encode([60, 61], [62, 1], 62, 0)
    np.testing.assert_array_equal(text_only(sample), encoder.whole_ids(encoder.text([60, 61], [62, 1], 0), 62))


def test_oldest_history_is_dropped_to_fit(encoder):
    history, candidates = list(range(30, 40)), list(range(5))
    full = encoder.encode(history, candidates, 2, 0)
    table = encoder.table(5)
    for limit in range(full.answer_end, full.answer_end - 60, -7):
        block = encode_rows(
            table,
            np.array([0, 10]),
            np.array(history),
            np.array([candidates]),
            np.array([2]),
            np.array([0]),
            max_tokens=limit,
        )
        sample = block.sample(0, 0, 0)
        dropped = int(block.dropped[0])
        assert len(sample.tokens) <= limit
        np.testing.assert_array_equal(sample.history, history[dropped:])
        np.testing.assert_array_equal(
            text_only(sample), encoder.whole_ids(encoder.text(history[dropped:], candidates, 0), 2)
        )
        if dropped:
            longer = encoder.encode(history[dropped - 1 :], candidates, 2, 0)
            assert len(longer.tokens) > limit
    with pytest.raises(InputError, match=r"key 9: needs .* tokens .*max_tokens"):
        encoder.encode(history, candidates, 2, 0, key=9, max_tokens=20)


def test_a_block_is_its_rows(encoder):
    rng = np.random.default_rng(2)
    rows = [draw(rng, 60) for _ in range(40)]
    lengths = [len(history) for history, _, _ in rows]
    candidates = np.stack([shown for _, shown, _ in rows])
    targets = np.array([target for _, _, target in rows])
    templates = rng.integers(0, 3, 40)
    limit = 260
    block = encode_rows(
        encoder.table(20),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([history for history, _, _ in rows]),
        candidates,
        (candidates == targets[:, None]).argmax(1),
        templates,
        max_tokens=1000,
    )
    assert limit < len(block.tokens)
    for number, (history, shown, target) in enumerate(rows):
        one, many = encoder.encode(history, shown, target, int(templates[number])), block.sample(number, 0, 0)
        for name in ("tokens", "slot_positions", "slot_items", "title_starts", "title_lengths"):
            np.testing.assert_array_equal(getattr(one, name), getattr(many, name))
        assert (one.answer_start, one.answer_end, one.target) == (many.answer_start, many.answer_end, many.target)


def test_a_tokenizer_that_crosses_spaces_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate(sorted(set("".join(worlds.corpus()))))}
    vocabulary = {**letters, "</s>": len(letters), ", ": len(letters) + 1, ", P": len(letters) + 2}
    crossing = Tokenizer(models.BPE(vocab=vocabulary, merges=[(",", " "), (", ", "P")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=crossing, eos_token="</s>")
    with pytest.raises(InputError, match="reach over a space"):
        PromptEncoder(tokenizer, ["Plain", "Other"], load_templates("movie")).table(2)


def test_empty_title_is_named(tokenizers):
    with pytest.raises(InputError, match="item 1: its title is empty"):
        PromptEncoder(tokenizers["gpt2"], ["x", " \n"], load_templates("movie"))


def test_shown_title():
    assert shown_title("  a\t b\u00a0 c ") == "a b c"


def test_sentencepiece_folder_has_sentencepiece_ids(tmp_path):
    import sentencepiece

    folder = worlds.sentencepiece_folder(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = plain_encoder(load_tokenizer(folder))
    rng = np.random.default_rng(0)
    texts = worlds.titles() + ["".join(rng.choice(list("ab ,.\n1é😀無'"), 14)).lstrip(" ") for _ in range(2000)]
    texts = [text for text in texts if text and not text.startswith(" ")]
    for text in texts:
        assert ids.encode(text, add_special_tokens=False).ids == reference.encode(text), text
    tokenizer = load_tokenizer(folder)
    assert tokenizer("Plain").input_ids == [tokenizer.bos_token_id, *reference.encode("Plain")]
    assert tokenizer.decode(reference.encode("Wait... 😀 a  b")) == "Wait... 😀 a  b"


def test_hash_names_the_tokenizer(tmp_path, tokenizers):
    hashes = {kind: tokenizer_hash(tokenizer) for kind, tokenizer in tokenizers.items()}
    assert len(set(hashes.values())) == len(KINDS)
    for kind, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(tmp_path / kind)
        assert tokenizer_hash(load_tokenizer(tmp_path / kind)) == hashes[kind]


def test_missing_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "empty").mkdir()
    for content in (None, "{}", "not JSON", '{"model": {"type": "BPE"}}'):
        if content is not None:
            (tmp_path / "empty/tokenizer.json").write_text(content)
        with pytest.raises(InputError, match="no tokenizer could be loaded") as caught:
            load_tokenizer(tmp_path / "empty")
        assert "\n" not in str(caught.value)


def _real_titles(shared: Path) -> dict[str, list[str]]:
    steam = (shared / "data/llara-steam/id2name.txt").read_text(encoding="utf-8").splitlines()
    movies = (shared / "data/ml-100k/u.item").read_text(encoding="latin-1").splitlines()
    return {
        "game": [line.split("::", 1)[1] for line in steam if "::" in line],
        "movie": [line.split("|")[1] for line in movies],
    }


def test_llama2_ids_are_sentencepieces_on_real_titles(shared):
    import sentencepiece

    folder = shared / "models/llama2-tokenizer"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = plain_encoder(load_tokenizer(folder))
    for titles in _real_titles(shared).values():
        for title in titles:
            assert ids.encode(title, add_special_tokens=False).ids == reference.encode(title), title


def test_segments_are_the_whole_string_on_real_titles(shared, tokenizers):
    """Every title of MovieLens and Steam as history, as candidate and as answer, with both families."""
    families = [load_tokenizer(shared / "models/llama2-tokenizer"), tokenizers["llama3"]]
    for domain, titles in _real_titles(shared).items():
        for tokenizer in families:
            encoder = PromptEncoder(tokenizer, titles, load_templates(domain), None)
            order = np.random.default_rng(0).permutation(len(titles))
            for start in range(0, len(titles), 10):
                history = order[start : start + 10]
                candidates = np.roll(order, -start - 13)[:20]
                sample = encoder.encode(history, candidates, int(candidates[start % 20]), start // 10 % 3)
                text = encoder.text(history, candidates, start // 10 % 3)
                np.testing.assert_array_equal(text_only(sample), encoder.whole_ids(text, int(candidates[start % 20])))
