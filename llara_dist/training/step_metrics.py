"""What is said of one optimizer step: the row of metrics.jsonl and TensorBoard."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

from llara_dist.cost.architecture import Architecture
from llara_dist.cost.communication import step_traffic
from llara_dist.cost.flops import step_flops
from llara_dist.cost.hardware import peak_flops
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import Work
from llara_dist.cost.zero import ZeroSettings
from llara_dist.stream.loader import Step
from llara_dist.supervision.progress import Phase
from llara_dist.training.engine import StepResult
from llara_dist.training.memory import peak_memory_mib
from llara_dist.training.run import Run


class StepMetrics:
    """Makes the rows of a run.

    Attributes:
        saving_s: seconds that checkpoints held up the steps since the last row.

    Args:
        run: whose steps they are.
    """

    def __init__(self, run: Run) -> None:
        self.saving_s = 0.0
        self._run = run
        engine = run.engine
        architecture = Architecture.of(engine.model.llm.config)
        table = engine.model.item_table
        bfloat16 = engine.model.dtype == torch.bfloat16
        self._zero = ZeroSettings.of(engine.ds_config)
        shape = (table.shape[0], table.shape[1])
        self._model = TunedModel.of(run.config, architecture, shape, bfloat16, self._zero.stage)
        on_gpu = engine.device.type == "cuda"
        world = engine.world.size
        # Walks over every parameter under stage 3, and steps have one of a few numbers of micro-batches.
        self._sent_bytes = cache(lambda number: step_traffic(self._model, self._zero, world, number).sent(world))
        self._peak = peak_flops(torch.cuda.get_device_name(engine.device)) if on_gpu and bfloat16 else None

    def row(self, step: Step, result: StepResult, wait_s: float, step_s: float) -> dict[str, Any]:
        """The numbers of one step.

        Of the whole world: `samples`, `tokens`, and both per second of waiting and computing. Of this rank: times,
        memory, `tflops_per_s` (model FLOPs of `cost/flops.py` a second of the step; padding and recomputation do not
        count), `mfu` (their share of the GPU's peak by its data sheet; null where that is not known) and
        `communication_mib` (what it sends, by the formulas of `cost/communication.py`, which tests hold against what
        really is sent).

        Args:
            step: as the loader gave it.
            result: what it gave; `loss` becomes null where it is not finite.
            wait_s: seconds that the rank waited for the step's data.
            step_s: seconds of the step itself: `forward_s` + `backward_s` + `update_s` and little else.
        """
        run = self._run
        lora_lr, projector_lr = run.rates(step.index)
        phases = run.engine.phases.read()
        whole = wait_s + step_s
        flops = step_flops(self._model, Work.of(step.microbatches)).model
        sent = self._sent_bytes(len(step.microbatches))
        saving_s, self.saving_s = self.saving_s, 0.0
        grad_norm = result.grad_norm  # may be read from the device
        return {
            "step": step.index,
            "epoch": step.epoch,
            "loss": result.loss if math.isfinite(result.loss) else None,
            "p": run.curriculum.probability(step.index),
            "hybrid_share": step.hybrid_samples / step.samples,
            "lora_lr": lora_lr,
            "projector_lr": projector_lr,
            "grad_norm": None if grad_norm is None or math.isinf(grad_norm) else grad_norm,
            "skipped_steps": run.faults.skipped,
            "samples": step.samples,
            "tokens": step.tokens,
            "microbatches": len(step.microbatches),
            "padding_share": step.padding_share,
            "samples_per_s": step.samples / whole,
            "tokens_per_s": step.tokens / whole,
            "tflops_per_s": flops / step_s / 1e12,
            "mfu": None if self._peak is None else flops / step_s / self._peak,
            "data_wait_s": wait_s,
            "step_s": step_s,
            "forward_s": phases.get(Phase.FORWARD, 0.0),
            "backward_s": phases.get(Phase.BACKWARD, 0.0),
            "update_s": phases.get(Phase.REDUCE, 0.0) + phases.get(Phase.STEP, 0.0),
            "saving_s": saving_s,
            "communication_mib": sent / 2**20,
            "memory_mib": peak_memory_mib(run.engine.device),
        }
