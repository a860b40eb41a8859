"""Small real things that tests are made of: a tokenizer, a Llama folder, samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from llara_dist.data.samples import Sample


def write_tokenizer(folder: Path, texts: list[str], vocabulary: int = 400) -> None:
    """Train a byte-level BPE on `texts` and save it with BOS and EOS as a transformers folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def write_llama(
    folder: Path, vocabulary: int = 400, hidden: int = 64, layers: int = 2, context: int = 1024, seed: int = 0
) -> None:
    """Save a random Llama: grouped-query attention, tied embeddings, weights wide enough to tell inputs apart."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_sample(key: int, seed: int = 0, vocabulary: int = 400, num_items: int = 50) -> Sample:
    """A random sample of the real form: titles of 1–4 tokens, each followed by its slot, then the answer and EOS."""
    random = np.random.default_rng((seed, key))
    num_history, num_candidates = int(random.integers(3, 8)), 5
    items = random.choice(num_items, num_history + num_candidates, replace=False).astype(np.int32)
    tokens, slots, starts, lengths = [0, *random.integers(2, vocabulary, 4)], [], [], []
    for _ in items:
        length = int(random.integers(1, 5))
        starts.append(len(tokens))
        lengths.append(length)
        tokens += list(random.integers(2, vocabulary, length))
        slots.append(len(tokens))
        tokens.append(0)
    tokens += list(random.integers(2, vocabulary, 3))
    answer_start = len(tokens)
    tokens += [*random.integers(2, vocabulary, int(random.integers(1, 4))), 1]
    return Sample(
        key=key,
        pass_index=0,
        tokens=np.array(tokens, np.uint32),
        slot_positions=np.array(slots, np.int32),
        slot_items=items,
        title_starts=np.array(starts, np.int32),
        title_lengths=np.array(lengths, np.int32),
        num_history=num_history,
        target_index=0,
        answer_start=answer_start,
        answer_end=len(tokens),
    )
