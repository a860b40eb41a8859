"""The published method's own way, written anew from the paper's description (LLaRA, sections 3.2 and 3.3).

Prompts are padded to the longest of the micro-batch. Behaviour tokens are placed by a Python loop over samples: one
call of the projector for all slots of a sample, with no regard to items that other samples have too; then an
inner loop writes slot by slot. The model computes logits of the whole vocabulary at every position and the loss over
all of them, where all but the answer's are ignored. The base model is not quantised: bfloat16 with bfloat16 adapters on
a GPU, float32 on a CPU, where bfloat16 is several times slower. Its weights are what the other arms' NF4 weights stand
for, so that losses can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.arms.setup import Setup, padded, set_trained, text_rows, trained
from benchmarks.arms.turns import Turns
from llara_dist.autotune.agreement import without_dropout
from llara_dist.data.samples import Sample
from llara_dist.model.nf4 import silence_import
from llara_dist.recommenders.item_table import load_item_table


class _Projector(nn.Module):
    def __init__(self, item_dim: int, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(item_dim, hidden)
        self.output = nn.Linear(hidden, hidden)

    def forward(self, items: Tensor) -> Tensor:
        return self.output(nn.functional.gelu(self.input(items)))


class PublishedLlara(nn.Module):
    """A Llama with LoRA whose prompts are assembled row by row.

    Args:
        llm: PEFT model around a LlamaForCausalLM.
        item_table: [num_items, d].
    """

    def __init__(self, llm: Any, item_table: Tensor) -> None:
        super().__init__()
        self.llm = llm
        self.projector = _Projector(item_table.shape[1], llm.config.hidden_size)
        self.register_buffer("item_table", item_table)

    def forward(self, samples: Sequence[Sample]) -> tuple[Tensor, int]:
        """Mean cross-entropy of a micro-batch's answer tokens, and how many positions were computed."""
        table: Any = self.item_table
        batch = padded(text_rows(samples, slots=True), table.device)
        embeddings = self.llm.get_input_embeddings()(batch["input_ids"])
        for row, sample in enumerate(samples):
            projected = self.projector(table[torch.from_numpy(sample.slot_items).to(table.device)])
            for slot, position in enumerate(sample.slot_positions.tolist()):
                embeddings[row, position] = projected[slot]
        output = self.llm(
            inputs_embeds=embeddings, attention_mask=batch["attention_mask"], labels=batch["labels"], use_cache=False
        )
        return output.loss, batch["input_ids"].numel()


def run(setup: Setup, turns: Turns, rows: int) -> None:
    """Train on the plan's steps in micro-batches of `rows` samples."""
    model = load(setup)
    samples = setup.checked()
    with without_dropout(model), torch.no_grad():
        loss = float(model(samples)[0])
    turns.ready(hybrid_loss=loss, rows=rows, base=str(setup.dtype).removeprefix("torch."))
    rates = setup.optimizer
    optimizer = torch.optim.AdamW([p for _, p in trained(model)], lr=rates.lora_lr, weight_decay=0.0)
    for step in setup.batches():
        turns.begin()
        answers = sum(sample.answer_end - sample.answer_start for sample in step)
        positions, total = 0, torch.zeros((), device=setup.torch_device)
        for first in range(0, len(step), rows):
            part = step[first : first + rows]
            mean, computed = model(part)
            loss = mean * (sum(sample.answer_end - sample.answer_start for sample in part) / answers)
            loss.backward()
            total += loss.detach()
            positions += computed
        torch.nn.utils.clip_grad_norm_([p for _, p in trained(model)], rates.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        turns.end(loss=float(total), positions=positions, tokens=sum(sample.answer_end for sample in step))


def load(setup: Setup) -> PublishedLlara:
    """The base without quantisation, adapters and projector in its dtype."""
    import peft
    from transformers import AutoModelForCausalLM

    silence_import()
    place = {"": setup.torch_device}
    quantised: Any = AutoModelForCausalLM.from_pretrained(setup.model, dtype=setup.dtype, device_map=place)
    base = quantised.dequantize().requires_grad_(False)
    lora = peft.LoraConfig(
        r=setup.lora.rank,
        lora_alpha=int(setup.lora.alpha),
        lora_dropout=setup.lora.dropout,
        target_modules=list(setup.lora.targets),
        task_type="CAUSAL_LM",
    )
    table = load_item_table(Path(setup.recommender)).weight
    model = PublishedLlara(peft.get_peft_model(base, lora, autocast_adapter_dtype=False), table)
    model = model.to(setup.torch_device, setup.dtype).train()
    set_trained(trained(model))
    return model
