"""What the speed benchmarks run on: a synthetic world with MovieLens' lengths, and random NF4 Llamas of any shape.

    PYTHONPATH=. python benchmarks/arms/inputs.py --out FOLDER --shape 7b

makes them once for several benchmarks, which take --inputs FOLDER.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

from llara_dist.config import ModelConfig
from llara_dist.data.build import build
from llara_dist.data.dataset import load_dataset
from llara_dist.data.prepare import prepare
from llara_dist.data.wording import load_templates
from llara_dist.integrity import write_json
from llara_dist.model.four_bit import skeleton
from llara_dist.model.nf4 import quantise, settings, silence_import
from llara_dist.model.quantize import ShardWriter
from llara_dist.model.tiny import train_tokenizer
from llara_dist.recommenders.item_table import write_recommender
from llara_dist.recommenders.sasrec import SASRec

SHAPES: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 1024,
    },
}
"""7b is Llama-2-7B's; small has its proportions and vocabulary at a size for a CPU; tiny is for tests"""

RECIPE = """
name: benchmark
domain: movie
source:
  kind: synthetic
  settings: {seed: 7, num_users: %d, num_items: 1000, min_events: 14, max_events: 20}
titles: {drop_year: false, move_articles: false}
sequences: {split: user, ratios: [0.8, 0.1, 0.1], min_history: 3, max_history: 10}
candidates: {count: 20}
"""
"""20 candidates and mostly 10 items of history, as MovieLens' rows have them"""
TITLE_VOCABULARY = 520
"""a small tokenizer cuts the synthetic titles of two words into as many tokens as Llama-2's cuts MovieLens' titles"""


def main() -> None:
    """Make everything in a new folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    make_inputs(options.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_random_nf4(options.out / "model", options.shape, options.out / "tokenizer", device)


def make_inputs(folder: Path, users: int = 1200) -> None:
    """Fill `folder` with data/, tokenizer/, recommender/ and shards/ through the package's own commands.

    The recommender keeps its random initial weights: speed does not depend on them.
    """
    with contextlib.redirect_stdout(sys.stderr):  # a benchmark's standard output is its result
        _make_inputs(folder, users)


def _make_inputs(folder: Path, users: int) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE % users)
    prepare(recipe=str(recipe), out=folder / "data")
    dataset = load_dataset(folder / "data")
    texts = [template.render(["a"], ["a"]) for template in load_templates(dataset.domain)]
    train_tokenizer([" " + title for title in dataset.titles] + texts, TITLE_VOCABULARY).save_pretrained(
        folder / "tokenizer"
    )
    torch.manual_seed(0)
    info = {"model": "sasrec", "dataset_hash": dataset.hash, "scores": {}}
    write_recommender(folder / "recommender", SASRec(dataset.num_items, 10, dim=64), info)
    build(data=folder / "data", tokenizer=str(folder / "tokenizer"), out=folder / "shards", processes=1)


def write_random_nf4(folder: Path, shape: str, tokenizer: Path, device: torch.device) -> None:
    """Write a Llama with random weights whose linear layers are NF4, as `llara-dist quantize` would store it.

    Each layer's weights are drawn and quantised on `device`; nothing is ever held whole in float.

    Args:
        folder: new model folder.
        shape: a name of `SHAPES`.
        tokenizer: folder whose tokenizer goes with the model; its ids must lie below the shape's vocabulary.
        device: where weights are made; also says in what the rest is stored, bfloat16 on a GPU, else float32.
    """
    import bitsandbytes
    from transformers import AutoTokenizer, LlamaConfig

    silence_import()
    sizes: dict[str, Any] = SHAPES[shape]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    architecture = LlamaConfig(
        **sizes,
        num_key_value_heads=sizes["num_attention_heads"],
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
    )
    bits = settings(ModelConfig(bits=4), dtype)
    folder.mkdir(parents=True)
    shards = ShardWriter(folder, 2 << 30)
    generator = torch.Generator(device).manual_seed(0)
    spread = 1.28 * sizes["hidden_size"] ** -0.5  # 0.02 at 7B's width; products as large, and losses as telling, at any
    for name, parameter in skeleton(architecture, bits, dtype).named_parameters():
        if name.endswith("norm.weight"):
            shards.add({name: torch.ones(parameter.shape, dtype=dtype)})
            continue
        linear = isinstance(parameter, bitsandbytes.nn.Params4bit)
        values = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0.0, spread, generator=generator)
        if not linear:
            shards.add({name: values.cpu()})
            continue
        packed, state = quantise(values, torch.uint8)
        stored = {f"{name}.{key}": value.cpu() for key, value in state.as_dict(packed=True).items()}
        shards.add({name: packed.cpu(), **stored})
    shards.close()
    architecture.architectures = ["LlamaForCausalLM"]
    described = {**architecture.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", {**described, "quantization_config": bits.to_dict()})
    tokens.save_pretrained(folder)


if __name__ == "__main__":
    main()
