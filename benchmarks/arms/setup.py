"""What every arm of the training-step benchmark is given, so that all compute the same steps from the same start."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llara_dist.autotune.agreement import without_dropout
from llara_dist.config import (
    CheckpointConfig,
    CurriculumConfig,
    DataConfig,
    KernelsConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RecommenderConfig,
    RunConfig,
)
from llara_dist.data.samples import Sample
from llara_dist.stream.plan import Plan
from llara_dist.stream.reader import ShardSet

CHECKED_SAMPLES = 4
"""the first samples of the first step, whose loss all arms compute before anything is timed"""
LONGEST_SAMPLE = 1024
"""tokens that no sample exceeds, and so the shortest packed row that holds any"""
IGNORED = -100
"""label of a position that no loss is computed at"""
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Setup:
    """One benchmark's sizes and inputs; JSON between processes.

    Attributes:
        model: folder of the NF4 model.
        shards: shards folder.
        recommender: folder of the recommender.
        scratch: folder for whatever an arm writes.
        device: cpu or cuda.
        threads: of each arm, on the CPU.
        global_batch: samples an optimizer step.
        budget: most tokens of a packed row.
        rows: samples that a padded micro-batch has, a divisor of `global_batch`.
        steps: optimizer steps, warm-up included.
        lora: of every arm.
        seed: of plan and dropout.
    """

    model: str
    shards: str
    recommender: str
    scratch: str
    device: str
    threads: int
    global_batch: int
    budget: int
    rows: int
    steps: int
    lora: LoraConfig = field(default_factory=LoraConfig)
    seed: int = 0

    @classmethod
    def read(cls, text: str) -> Setup:
        """From `write`'s JSON."""
        values = json.loads(text)
        lora = {**values["lora"], "targets": tuple(values["lora"]["targets"])}
        return cls(**{**values, "lora": LoraConfig(**lora)})

    def write(self) -> str:
        """As one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @property
    def torch_device(self) -> torch.device:
        """The device, with its index on a GPU."""
        return torch.device("cuda", 0) if self.device == "cuda" else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products run in."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def run_config(self, name: str, kernels: KernelsConfig, activation_checkpointing: bool = False) -> RunConfig:
        """This package's run over the same steps, every sample hybrid."""
        return RunConfig(
            model=ModelConfig(path=self.model, bits=4, activation_checkpointing=activation_checkpointing),
            lora=self.lora,
            kernels=kernels,
            recommender=RecommenderConfig(path=Path(self.recommender)),
            data=DataConfig(
                shards=self.shards,
                epochs=1,
                max_steps=self.steps,
                global_batch_samples=self.global_batch,
                max_tokens_per_microbatch=self.budget,
                workers=2 if self.device == "cuda" else 0,
            ),
            curriculum=CurriculumConfig(schedule="constant", probability=1.0),
            optimizer=self.optimizer,
            checkpoint=CheckpointConfig(every_steps=0),
            deepspeed=ROOT / "ds_configs" / "zero0.json",
            out=Path(self.scratch) / name,
            device="cuda" if self.device == "cuda" else "cpu",
            seed=self.seed,
        )

    @property
    def optimizer(self) -> OptimizerConfig:
        """The paper's rates; gradients clipped to norm 1 in every arm."""
        return OptimizerConfig()

    def batches(self) -> Iterator[list[Sample]]:
        """Each optimizer step's samples, in the plan's order."""
        shards = ShardSet.open(self.shards, "train")
        plan = Plan(shards.sources, self.seed, self.global_batch, epochs=1)
        for step in range(self.steps):
            yield shards.read(plan.step(step))

    def checked(self) -> list[Sample]:
        """The samples whose loss is compared."""
        return next(self.batches())[:CHECKED_SAMPLES]


@torch.no_grad()
def set_trained(parameters: Iterable[tuple[str, nn.Parameter | Tensor]]) -> None:
    """Give adapters and projector values that depend on their names alone, so that all arms start from one point.

    LoRA's B is not left at zero: the loss would not show whether the adapters are there.

    Args:
        parameters: names and tensors; of a layer's adapter from `layers.` on, of the projector from `projector.` on.
    """
    for name, parameter in parameters:
        part = "layers." if "layers." in name else "projector."
        known = name[name.index(part) :]
        generator = torch.Generator().manual_seed(zlib.crc32(known.encode()))
        fan_in = parameter.shape[-1]
        scale = 0.02 if "lora_B" in known or parameter.ndim == 1 else fan_in**-0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that train, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def text_rows(samples: Sequence[Sample], slots: bool) -> list[dict[str, list[int]]]:
    """Rows for a trainer of plain text: ids, and labels at the answer alone.

    Args:
        samples: of the step.
        slots: whether each slot stays, as the plain token that the shards hold there; else it is taken out.
    """
    rows = []
    for sample in samples:
        tokens = sample.tokens[: sample.answer_end].astype(np.int64)
        labels = np.full(len(tokens), IGNORED)
        labels[sample.answer_start :] = tokens[sample.answer_start :]
        if not slots:
            tokens, labels = (np.delete(array, sample.slot_positions) for array in (tokens, labels))
        rows.append({"input_ids": tokens.tolist(), "labels": labels.tolist()})
    return rows


def padded(rows: Sequence[dict[str, list[int]]], device: torch.device) -> dict[str, Tensor]:
    """Rows padded on the right to the longest: input_ids, attention_mask, labels, int64 [N, L]."""
    longest = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), longest)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.tensor(row["input_ids"])
        labels[index, :length] = torch.tensor(row["labels"])
        mask[index, :length] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


@torch.no_grad()
def text_loss(model: Any, samples: Sequence[Sample], setup: Setup) -> float:
    """Mean cross-entropy of the answers after text-only prompts, as a causal model with labels computes it."""
    with without_dropout(model), torch.autocast(setup.device, torch.bfloat16, enabled=setup.device == "cuda"):
        return float(model(**padded(text_rows(samples, slots=False), setup.torch_device)).loss)
