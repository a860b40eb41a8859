"""Peers that train text: transformers' Trainer, TRL, Unsloth and LLaMA-Factory, each as its users write it.

None of them has behaviour tokens. They get the same prompts with a plain token in each slot: as many positions as our
hybrid prompts, without the projector's work, which favours them. Labels are the answer's tokens alone. LoRA, optimizer,
clipping and samples of a step are the same; their loaders make a step's batches before its time begins, ours within.
Activations are not recomputed, unless the arm says so: their own default would be slower by a third.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.arms.setup import LONGEST_SAMPLE, Setup, set_trained, text_loss, text_rows, trained
from benchmarks.arms.turns import Turns
from llara_dist.model.nf4 import silence_import

FLASH = "flash_attention_2"
"""transformers' name of flash-attn"""
MASKED = "sdpa with a mask over the whole row (no flash-attn)"
"""how a peer that packs is told to attend where there is none"""


class NotHere(Exception):
    """A peer that this machine cannot run; says why."""


class Counting:
    """A collator that counts the positions and the tokens of the batches that it makes, in a loader's processes too.

    Args:
        collate: the trainer's own.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate
        self._positions, self._tokens = multiprocessing.Value("q", 0), multiprocessing.Value("q", 0)

    @property
    def positions(self) -> int:
        """Padding included."""
        return self._positions.value

    @property
    def tokens(self) -> int:
        """Without padding."""
        return self._tokens.value

    def __call__(self, rows: Any) -> Any:
        """Collate, and count."""
        batch = self._collate(rows)
        with self._positions.get_lock():
            self._positions.value += batch["input_ids"].numel()
        with self._tokens.get_lock():
            self._tokens.value += sum(len(row["input_ids"]) for row in rows)
        return batch


def turn_callback(turns: Turns, counting: Counting) -> Any:
    """A TrainerCallback that computes a step when it is this arm's turn."""
    from transformers import TrainerCallback

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # Of the whole run so far: loaders make batches ahead.
            turns.end(positions_so_far=counting.positions, tokens_so_far=counting.tokens)

    return TakeTurns()


def training_arguments(setup: Setup, rows: int) -> dict[str, Any]:
    """Arguments that TrainingArguments and its descendants take; no logging, no checkpoints.

    The optimizer is the one that they take unasked: AdamW, PyTorch's fused one from torch 2.8 on.
    """
    rates = setup.optimizer
    return {
        "output_dir": setup.scratch,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": setup.global_batch // rows,
        "max_steps": setup.steps,
        "learning_rate": rates.lora_lr,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "max_grad_norm": rates.max_grad_norm,
        "bf16": setup.device == "cuda",
        "use_cpu": setup.device == "cpu",
        "dataloader_num_workers": 2 if setup.device == "cuda" else 0,
        "dataloader_pin_memory": setup.device == "cuda",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": setup.seed,
    }


def load_quantised(setup: Setup, recompute: bool, attention: str | None = None) -> Any:
    """The NF4 base with float32 adapters, as PEFT's and transformers' documents tell."""
    import peft
    from transformers import AutoModelForCausalLM

    silence_import()
    place = {"": setup.torch_device}
    chosen = {} if attention is None else {"attn_implementation": attention}
    base: Any = AutoModelForCausalLM.from_pretrained(setup.model, dtype=setup.dtype, device_map=place, **chosen)
    base.config.use_cache = False
    prepared = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=recompute)
    model = peft.get_peft_model(prepared, lora_config(setup)).train()
    set_trained(trained(model))
    return model


def lora_config(setup: Setup) -> Any:
    """The adapters of every arm."""
    import peft

    return peft.LoraConfig(
        r=setup.lora.rank,
        lora_alpha=int(setup.lora.alpha),
        lora_dropout=setup.lora.dropout,
        target_modules=list(setup.lora.targets),
        task_type="CAUSAL_LM",
    )


def load_tokenizer(setup: Setup) -> Any:
    """The model's tokenizer, padding with EOS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(setup.model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def all_rows(setup: Setup) -> list[dict[str, list[int]]]:
    """The rows of all steps, in the plan's order."""
    return [row for step in setup.batches() for row in text_rows(step, slots=True)]


def run_trainer(setup: Setup, turns: Turns, rows: int, grouped: bool = False, recompute: bool = False) -> None:
    """transformers' Trainer over padded rows, in the plan's order or grouped by length."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = load_quantised(setup, recompute)
    loss = text_loss(model, setup.checked(), setup)
    sampling = "group_by_length" if grouped else "sequential"
    collator = Counting(DataCollatorForSeq2Seq(load_tokenizer(setup), padding=True))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            **training_arguments(setup, rows), train_sampling_strategy=sampling, remove_unused_columns=False
        ),
        train_dataset=all_rows(setup),  # pyright: ignore[reportArgumentType]
        data_collator=collator,
        callbacks=[turn_callback(turns, collator)],
    )
    turns.ready(text_loss=loss, rows=rows)
    trainer.train()


def run_sft(setup: Setup, turns: Turns, rows: int) -> None:
    """TRL's SFTTrainer, padding-free, with flash-attention where it is installed."""
    require("trl", "datasets")
    flash = has_flash(setup)
    model = load_quantised(setup, recompute=False, attention=FLASH if flash else "sdpa")
    loss = text_loss(model, setup.checked(), setup)
    turns.ready(text_loss=loss, rows=rows, attention=FLASH if flash else MASKED)
    train_sft(setup, turns, rows, model, load_tokenizer(setup))


def run_unsloth(setup: Setup, turns: Turns, rows: int) -> None:
    """Unsloth's FastLanguageModel under TRL's SFTTrainer, which it patches; padding-free where it agrees to that.

    Its loss is not compared with ours.
    """
    require("unsloth", "trl", "datasets")
    import unsloth  # pyright: ignore[reportMissingImports]

    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        setup.model, max_seq_length=LONGEST_SAMPLE, dtype=setup.dtype, load_in_4bit=True, local_files_only=True
    )
    tokenizer.pad_token = tokenizer.eos_token
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=setup.lora.rank,
        lora_alpha=int(setup.lora.alpha),
        lora_dropout=setup.lora.dropout,
        target_modules=list(setup.lora.targets),
        use_gradient_checkpointing=False,
    )
    set_trained(trained(model))
    turns.ready(rows=rows, loss="not compared")
    train_sft(setup, turns, rows, model, tokenizer)


def train_sft(setup: Setup, turns: Turns, rows: int, model: Any, tokenizer: Any) -> None:
    """SFTTrainer over rows that are tokenised already, end to end in one row without padding."""
    import datasets  # pyright: ignore[reportMissingImports]
    import trl  # pyright: ignore[reportMissingImports]

    arguments = trl.SFTConfig(
        **training_arguments(setup, rows),
        padding_free=True,
        max_length=None,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(all_rows(setup)),
        processing_class=tokenizer,
    )
    trainer.data_collator = Counting(trainer.data_collator)
    trainer.add_callback(turn_callback(turns, trainer.data_collator))
    trainer.train()


def run_llama_factory(setup: Setup, turns: Turns, rows: int) -> None:
    """LLaMA-Factory's supervised fine-tuning, packed with attention inside each sample (its `neat_packing`).

    It tokenises the prompts' text itself, special tokens included: to the same tokens, or the result counts the samples
    with others. A step has the same samples as ours: its packing sees one step's samples at a time and its rows are not
    shuffled. All its rows have one length, filled up with padding that only flash-attention takes out again: the
    shortest length at which every step has equally many rows, and as few as possible. Adapters are float32, as in the
    other arms. Version 0.9.5 wants older libraries than this package: the result names those that it ran on.
    """
    require("llamafactory")
    from llamafactory.train.tuner import run_exp  # pyright: ignore[reportMissingImports]
    from transformers import TrainerCallback

    tokenizer = load_tokenizer(setup)
    folder = Path(setup.scratch) / "llama_factory"
    folder.mkdir(exist_ok=True)  # a second attempt, with shorter rows
    records, lengths, different = [], [], 0
    for step in setup.batches():
        lengths.append([])
        for sample in step:
            ids = sample.tokens[: sample.answer_end].tolist()
            texts = [tokenizer.decode(part) for part in (ids[: sample.answer_start], ids[sample.answer_start :])]
            again = [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)]
            records.append({"instruction": texts[0], "input": "", "output": texts[1]})
            lengths[-1].append(len(again))
            different += again != ids
    (folder / "rows.json").write_text(json.dumps(records))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    rows_a_step, positions = equal_rows(lengths, max(setup.budget * rows // setup.rows, LONGEST_SAMPLE))
    flash = has_flash(setup)

    class TakeTurns(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs["model"]
            set_trained(trained(model))
            turns.ready(
                text_loss=text_loss(model, setup.checked(), setup),
                attention=FLASH if flash else MASKED,
                rows_a_step=rows_a_step,
                positions_of_a_row=positions,
                samples_with_other_tokens=different,
                libraries={name: version(name) for name in ("transformers", "peft", "accelerate")},
            )

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tokens = sum(lengths[state.global_step - 1])
            turns.end(tokens=tokens, positions=tokens if flash else rows_a_step * positions)

    run_exp(
        {
            "model_name_or_path": setup.model,
            "cache_dir": str(folder),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": setup.lora.rank,
            "lora_alpha": int(setup.lora.alpha),
            "lora_dropout": setup.lora.dropout,
            "lora_target": ",".join(setup.lora.targets),
            "dataset": "rows",
            "dataset_dir": str(folder),
            "template": "empty",
            "packing": True,
            "neat_packing": True,
            "cutoff_len": positions,
            "preprocessing_batch_size": setup.global_batch,
            "disable_shuffling": True,
            "flash_attn": "fa2" if flash else "sdpa",
            "disable_gradient_checkpointing": True,
            "overwrite_output_dir": True,
            **training_arguments(setup, rows),
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": rows_a_step,
        },
        callbacks=[TakeTurns()],
    )


def equal_rows(lengths: list[list[int]], most: int) -> tuple[int, int]:
    """Into how many rows LLaMA-Factory packs each step, and how many positions they have: fewest rows, then shortest.

    Args:
        lengths: tokens of each step's samples.
        most: positions of a row.

    Raises:
        NotHere: at every length some steps would have more rows than others.
    """
    from llamafactory.data.processor.processor_utils import greedy_knapsack  # pyright: ignore[reportMissingImports]

    found = []
    longest = max(max(step) for step in lengths)
    # It keeps one position free, and pads all but the position ids to a multiple of 8.
    for positions in range((longest // 8 + 1) * 8, most + 1, 8):
        rows = {len(greedy_knapsack(list(step), positions - 1)) for step in lengths}
        if len(rows) == 1:
            found.append((rows.pop(), positions))
    if not found:
        raise NotHere("at no length of its rows do all steps have equally many")
    return min(found)


def has_flash(setup: Setup) -> bool:
    """Whether a peer that packs can keep samples apart without a mask."""
    return setup.device == "cuda" and importlib.util.find_spec("flash_attn") is not None


def require(*packages: str) -> None:
    """Every package is installed.

    Raises:
        NotHere: one is not.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise NotHere(f"not installed: {', '.join(missing)}")
