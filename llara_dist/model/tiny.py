"""A tiny Llama, made and pre-trained here, for the quickstart, tests and debugging where no real one is at hand."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from llara_dist.console import say
from llara_dist.data.dataset import load_dataset
from llara_dist.data.synthetic import words
from llara_dist.data.tokenizer import load_tokenizer
from llara_dist.data.wording import DOMAINS, load_templates
from llara_dist.errors import InputError
from llara_dist.integrity import read_json, staged_folder, write_json
from llara_dist.model.catalogues import DatasetRows, RandomCatalogues
from llara_dist.model.pretraining import ProgressLog, pretrain

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

BOS, EOS = "<s>", "</s>"
CATALOGUE_SEED = 0x7E57
"""seed space of the random catalogues; the quickstart's world is drawn from another (data/synthetic.py)"""


def tiny_base() -> Path:
    """Folder of the tiny Llama shipped with the package."""
    return Path(str(resources.files("llara_dist.model").joinpath("tiny_base")))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with BOS and EOS.

    Args:
        texts: what it should hold short ids for.
        vocab_size: at most; training ends earlier where every word is one token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def _catalogue_texts() -> list[str]:
    """Every word of the synthetic titles with its leading space, small numbers, and the prompts' wordings."""
    shown = [" " + word for word in words().all] + [f" {number}" for number in range(1, 21)]
    return 5 * (shown + [template.render(["a"], ["a"]) for domain in DOMAINS for template in load_templates(domain)])


def new_llama(
    tokenizer: PreTrainedTokenizerBase, hidden: int, layers: int, heads: int, head_dim: int, seed: int
) -> LlamaForCausalLM:
    """A Llama with random weights, float32, tied embeddings, for prompts of up to 1,024 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    bos: Any = tokenizer.bos_token_id
    eos: Any = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        max_position_embeddings=1024,
        # Slow rotation leaves most of a head's dimensions to match content by, wherever it stands.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
        rms_norm_eps=1e-5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # Logits are products with these rows: of norm 1, the uniform guess is where training starts.
        embedding: Any = model.get_input_embeddings()
        torch.nn.init.normal_(embedding.weight, std=hidden**-0.5)
    return model


def _load(folder: Path) -> LlamaForCausalLM:
    """A tiny Llama from its folder, float32."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)


def tiny_llama(
    out: Path,
    data: Path | None = None,
    catalogues: int | None = None,
    tokenizer: Path | None = None,
    start: Path | None = None,
    max_candidates: int = 20,
    hybrid_share: float = 0.65,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    head_dim: int = 64,
    vocab_size: int = 2048,
    steps: int = 6000,
    tokens_per_step: int = 1500,
    lr: float = 2e-3,
    matrix_lr: float = 0.008,
    seed: int = 1,
    save_as: Literal["float16", "bfloat16", "float32"] = "float16",
    precision: Literal["highest", "medium"] = "medium",
) -> dict:
    """Make a tiny Llama and pre-train it from scratch on prompts of this task, in minutes, on a CPU.

    With --catalogues it sees random synthetic catalogues and learns to read, match and copy any titles made of their
    words; it learns nothing of the quickstart's own. With --data it sees the text-only prompts of that data set's
    training rows. The base that the package ships was made by the first example, in half an hour on one core.

    Example:
        llara-dist tiny-llama --catalogues 1000000 --out tiny
        llara-dist tiny-llama --data DATA --tokenizer llama2-tokenizer --hidden 256 --layers 4 --out tiny

    Args:
        out: new folder in transformers' form, model and tokenizer.
        data: data set folder whose training rows to show.
        catalogues: how many random catalogues to draw rows from instead; each row shows one of them.
        tokenizer: folder with a tokenizer; by default one is trained on the titles and the prompts' wordings.
        start: folder of a tiny Llama to go on from, at full difficulty, instead of random weights; its tokenizer and
            its sizes are kept.
        max_candidates: most candidates of a row, with --catalogues.
        hybrid_share: share of steps whose slots hold behaviour vectors, with --catalogues.
        hidden: width h of the model; the inner width of its feed-forward layers is 3 h.
        layers: number of layers.
        heads: attention heads.
        head_dim: width of a head.
        vocab_size: most tokens of a tokenizer trained here.
        steps: optimizer steps.
        tokens_per_step: roughly how many tokens a step sees.
        lr: AdamW's learning rate, for embeddings and norms.
        matrix_lr: Muon's learning rate, for the layers' matrices.
        seed: of weights, catalogues and rows.
        save_as: dtype of the saved weights.
        precision: of float32 matrix products; medium lets processors that have bfloat16 products use them.
    """
    if (data is None) == (catalogues is None):
        raise InputError("tiny-llama: give either --data DATA or --catalogues N")
    if min(hidden, layers, heads, head_dim, steps, tokens_per_step) < 1 or head_dim % 2:
        raise InputError("tiny-llama: sizes and steps must be at least 1, head_dim even")
    if catalogues is not None and catalogues < 1:
        raise InputError(f"tiny-llama: --catalogues is {catalogues}, must be at least 1")
    if not 4 <= max_candidates <= 40 or not 0.0 <= hybrid_share <= 1.0:
        raise InputError(
            f"tiny-llama: --max_candidates {max_candidates} must be 4 to 40, --hybrid_share {hybrid_share} 0 to 1"
        )
    if start is not None:
        read_json(start / "pretraining.json", "a folder made by `llara-dist tiny-llama`")
    dataset = None if data is None else load_dataset(data)
    with staged_folder(out) as staging:
        if start is not None or tokenizer is not None:
            made = load_tokenizer(start or tokenizer)  # pyright: ignore[reportArgumentType]
        elif dataset is not None:
            texts = [template.render(["a"], ["a"]) for template in load_templates(dataset.domain)]
            made = train_tokenizer([" " + title for title in dataset.titles] + texts, vocab_size)
        else:
            made = train_tokenizer(_catalogue_texts(), vocab_size)
        if start is None:
            model = new_llama(made, hidden, layers, heads, head_dim, seed)
        else:
            model = _load(start)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        say(f"tiny Llama: {parameters:,} parameters, {len(made):,} tokens in the vocabulary, {steps:,} steps")
        log = ProgressLog(every=max(1, min(100, steps // 10)), steps=steps)

        def report(step: Any) -> None:
            line = log.add(step)
            if line is not None:
                say(line)

        if dataset is not None:
            source = DatasetRows(made, dataset, seed)
        else:
            assert catalogues is not None
            source = RandomCatalogues(made, CATALOGUE_SEED + seed, catalogues, max_candidates)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            pretrain(
                model,
                source,
                slots=dataset is None,
                steps=steps,
                tokens_per_step=tokens_per_step,
                lr=lr,
                matrix_lr=matrix_lr,
                seed=seed,
                level=0.0 if start is None else 1.0,
                hybrid_share=hybrid_share,
                report=report,
            )
        finally:
            torch.set_float32_matmul_precision(before)
        model.to(getattr(torch, save_as))  # pyright: ignore[reportArgumentType]
        model.save_pretrained(staging)
        made.save_pretrained(staging)
        result = {
            "parameters": parameters,
            "vocabulary": len(made),
            "catalogues": catalogues,
            "data": None if dataset is None else dataset.hash,
            "start": None if start is None else read_json(start / "pretraining.json", "how --start was pre-trained"),
            "max_candidates": source.max_candidates,
            "hybrid_share": hybrid_share,
            "hidden": model.config.hidden_size,
            "layers": model.config.num_hidden_layers,
            "heads": model.config.num_attention_heads,
            "head_dim": model.config.head_dim,
            "steps": steps,
            "tokens_per_step": tokens_per_step,
            "lr": lr,
            "matrix_lr": matrix_lr,
            "seed": seed,
            "precision": precision,
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "curve": log.records,
        }
        write_json(staging / "pretraining.json", result)
    say(f"written to {out}")
    return {"out": str(out), **{k: v for k, v in result.items() if k != "curve"}, "last": log.records[-1]}
