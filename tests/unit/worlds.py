"""A small data set with awkward titles, and tokenizers of the families in use, trained on it within a second."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from llara_dist.data.candidates import draw_candidates
from llara_dist.data.dataset import Rows, row_exclusions, write_dataset
from llara_dist.data.log import Log
from llara_dist.hashing import hash64

AWKWARD = [
    "Plain",
    "Two Words",
    "Brackets (1995)",
    '"Quoted"',
    "Ends with a dot.",
    "Wait...",
    "Comma, The",
    "One, Two, Three",
    "1984",
    "2001 2010 40,000",
    "Ænima Ünïcödé™",
    "真・三國無双７ with 猛将伝",
    "Smile 😀",
    "😀",
    " leading",
    "trailing ",
    "double  space",
    "tab\tand\nnewline",
    "</s>",
    "<|endoftext|> <s>",
    "Why?",
    "!!!",
    "(",
    "it's",
    "a",
    "Answer: Plain",
    "e\u0301clair",
    "No\u00a0Break",
    "3D",
    "Mr. & Mrs. Smith: Part II - The Return of the Very Long Title That Goes On, and On, and On, Until It Is Cut",
]
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def titles(num_items: int = 60) -> list[str]:
    """The awkward ones, then plain ones."""
    colours = ["Red", "Blue", "Green"]
    plain = [f"Item {index} of the {colours[index % 3]} kind" for index in range(num_items)]
    return (AWKWARD + plain)[:num_items]


def corpus() -> list[str]:
    """Text to train a tokenizer on."""
    from llara_dist.data.wording import load_templates

    texts = [template.text for domain in ("movie", "game", "artist") for template in load_templates(domain)]
    return texts * 5 + titles() * 3 + ["the quick brown fox, 1234 (jumps) over", "a  b   c"] * 5


def byte_level(pattern: str = LLAMA3_SPLIT, vocabulary: int = 600, bos: bool = True):
    """A byte-level BPE tokenizer with the given pre-tokeniser, as a transformers one."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|begin|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    names = {"bos_token": "<|begin|>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", **names)


def sentencepiece_folder(folder: Path, vocabulary: int = 500) -> Path:
    """A folder with a Llama-like SentencePiece `tokenizer.model` and nothing else."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=0.99,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def write_world(
    out: Path, num_users: int = 60, num_items: int = 60, seed: int = 0, num_candidates: int = 20, domain: str = "movie"
) -> Path:
    """A dataset folder: every user touches 6 to 16 items; train windows, one val and one test row for some users."""
    counts = 6 + (hash64(seed, 1, np.arange(num_users)) % np.uint64(11)).astype(int)
    chosen = [np.argsort(hash64(seed, 2, user, np.arange(num_items)))[: counts[user]] for user in range(num_users)]
    windows: dict[str, list[tuple[int, np.ndarray, int]]] = {"train": [], "val": [], "test": []}
    for user, items in enumerate(chosen):
        split = "val" if user % 10 == 8 else "test" if user % 10 == 9 else "train"
        ends = range(3, len(items)) if split == "train" else [len(items) - 1]
        windows[split] += [(user, items[max(0, end - 10) : end], items[end]) for end in ends]
    users = np.repeat(np.arange(num_users), counts).astype(np.int32)
    log = Log(
        users=users,
        items=np.concatenate(chosen).astype(np.int32),
        timestamps=np.arange(len(users), dtype=np.int64),
        titles=titles(num_items),
        domain=domain,
    )
    splits, first = {}, 0
    for name, rows in windows.items():
        lengths = [len(history) for _, history, _ in rows]
        splits[name] = Rows(
            keys=np.arange(first, first + len(rows), dtype=np.uint64),
            users=np.array([user for user, _, _ in rows], dtype=np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            items=np.concatenate([history for _, history, _ in rows]).astype(np.int32),
            targets=np.array([target for _, _, target in rows], dtype=np.int32),
        )
        first += len(rows)
    touched = np.concatenate([[0], np.cumsum(counts)]), np.concatenate(chosen).astype(np.int32)
    frozen = {}
    for name in ("val", "test"):
        rows = splits[name]
        excluded = row_exclusions(rows, *touched, 0, len(rows))
        frozen[name] = draw_candidates(rows.keys, rows.targets, *excluded, num_items, num_candidates, seed, 0)
    write_dataset(
        out,
        name="awkward",
        log=log,
        splits=splits,
        candidates=frozen,
        recipe={"seed": seed},
        max_history=10,
        min_history=3,
        counts={},
        audit={},
        notes=[],
    )
    return out


def write_shards(root: Path, num_users: int = 40, samples_per_shard: int = 60) -> Path:
    """`data`, `tokenizer` and `shards` (two passes, several shards a pass) in a folder; returns the folder."""
    from llara_dist.data.build import build

    write_world(root / "data", num_users=num_users)
    byte_level().save_pretrained(root / "tokenizer")
    settings = {"passes": 2, "processes": 1, "samples_per_shard": samples_per_shard}
    build(root / "data", str(root / "tokenizer"), root / "shards", **settings)
    return root


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder: its path inside the folder and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def damage(path: Path, at: int, count: int = 1) -> None:
    """Flip a bit of each of `count` bytes of a file."""
    data = bytearray(path.read_bytes())
    for place in range(at, at + count):
        data[place] ^= 0x20
    path.write_bytes(data)
