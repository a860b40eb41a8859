"""Tokenizers: load any Llama-architecture one exactly, fingerprint it, and turn plain text into ids with offsets.

A folder that holds only SentencePiece's `tokenizer.model` is converted here: transformers 5.23 orders the merges of
such a file by piece id instead of by score, which puts runs of spaces first ("x  y" then differs from what
SentencePiece itself returns), and its AutoTokenizer drops BOS and the leading space as well. What remains different
from SentencePiece: a text that itself begins with a space, and runs of more than 16 spaces; prompts hold neither.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from llara_dist.errors import InputError
from llara_dist.integrity import sha256_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# SentencePiece's piece types (sentencepiece_model.proto, ModelProto.SentencePiece.Type).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2
_SPACE = "▁"

# Text whose ids tell tokenizers with equal vocabularies apart: spaces, digits, punctuation, bytes, newlines.
_PROBES = (
    "Hello, world",
    "a  b   c",
    " 1995 12345 (2nd)",
    '...!?\'s "x"',
    "Ünïcödé 真・三國 😀",
    "\n\nA\n B",
    "</s><s>",
)


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder (tokenizer.json, or SentencePiece's tokenizer.model alone) or a hub id.

    Args:
        path: folder or hub id.
        revision: of a hub id: branch, tag or commit; ignored for a folder.

    Raises:
        InputError: nothing loadable there, or a tokenizer without a `tokenizers` backend.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "tokenizer.json").exists() and (folder / "tokenizer.model").exists():
        return _from_sentencepiece(folder / "tokenizer.model")
    if (folder.is_absolute() or len(folder.parts) > 2) and not folder.is_dir():
        raise InputError(f"{path}: no such folder; expected a tokenizer (tokenizer.json or tokenizer.model)")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), revision=revision, trust_remote_code=False)
    except Exception as error:  # the libraries raise anything here, a bare Exception for a damaged tokenizer.json
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: no tokenizer could be loaded from this folder or hub id ({reason})") from None
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise InputError(f"{path}: {type(tokenizer).__name__} has no fast backend; save it with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer names no EOS token; set eos_token in tokenizer_config.json")
    return tokenizer


def plain_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A private copy of the backend that adds no BOS/EOS, cuts and pads nothing, and reads "</s>" in a title as text.

    Encode with ``add_special_tokens=False``.
    """
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(getattr(tokenizer, "backend_tokenizer").to_str())  # noqa: B009 (untyped in the base class)
    encoder.no_padding()
    encoder.no_truncation()
    encoder.encode_special_tokens = True
    return encoder


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex sha256 of all that decides ids: vocabulary, merges, BOS and EOS, and the ids of probe texts.

    It does not depend on the library's version, on the path, or on whether it came from tokenizer.model or from the
    tokenizer.json saved from it.
    """
    encoder = plain_encoder(tokenizer)
    model = json.loads(encoder.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    return sha256_json(
        {
            "vocabulary": sorted((index, token) for token, index in encoder.get_vocab(with_added_tokens=True).items()),
            "merges": merges,
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "probes": [encoder.encode(text, add_special_tokens=False).ids for text in _PROBES],
        }
    )


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    """A fast tokenizer with the ids of a SentencePiece BPE model (Llama, Llama 2, Mistral, TinyLlama)."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        raise InputError(f"{path}: not a SentencePiece model") from None
    if proto.trainer_spec.model_type != _BPE:
        raise InputError(f"{path}: a SentencePiece model of another type than BPE; save it as tokenizer.json")
    pieces = list(proto.pieces)
    vocabulary = {piece.piece: index for index, piece in enumerate(pieces)}
    special = {kind: [piece.piece for piece in pieces if piece.type == kind] for kind in range(1, 7)}
    scores = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}
    byte_fallback = bool(special[_BYTE])
    unknown = special[_UNKNOWN][0]

    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(scores, vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    steps = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    prefix = proto.normalizer_spec.add_dummy_prefix
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(  # pyright: ignore[reportAttributeAccessIssue]
        replacement=_SPACE, prepend_scheme="first" if prefix else "never", split=False
    )
    undo = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        undo.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(undo)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special[_UNKNOWN]])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special[_CONTROL]])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in special[_USER_DEFINED]])

    names = {"unk_token": unknown}
    if proto.trainer_spec.bos_id >= 0:
        names["bos_token"] = pieces[proto.trainer_spec.bos_id].piece
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=f"{names['bos_token']} $A",
            pair=f"{names['bos_token']} $A {names['bos_token']}:1 $B:1",
            special_tokens=[(names["bos_token"], proto.trainer_spec.bos_id)],
        )
    if proto.trainer_spec.eos_id < 0:
        raise InputError(f"{path}: the model has no EOS piece; a learnt answer needs one")
    names["eos_token"] = pieces[proto.trainer_spec.eos_id].piece
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def _merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Merge rules in SentencePiece's order: the pair whose union scores highest merges first."""
    ranked = sorted(scores, key=lambda piece: (-scores[piece], len(piece), vocabulary[piece]))
    merges: list[tuple[str, str]] = []
    for piece in ranked:
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = [pair for pair in splits if pair[0] in scores and pair[1] in scores]
        merges += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges
