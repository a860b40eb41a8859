"""Memory of one rank, on its device and on the host, by kind.

Frozen weights: NF4 packs two elements a byte; a constant of one byte a block of 64, and one of four bytes a 256 of
those (double quantisation). Embedding, norms, head and biases are held in the compute type. Trained parameters, their
gradients and AdamW's two moments are float32: with P trained elements on W ranks,

- stage 0: 4P parameters, 4P gradients, 8P moments, 4P gradients flattened to be reduced (W > 1);
- stages 1 and 2: 4P parameters, 4P/W masters, 8P/W moments; stage 1 keeps 4P gradients until the last micro-batch,
  stage 2 4P/W; a bucket of `reduce_bucket_size` floats (two where reductions overlap);
- stage 3: 4P/W parameters, 4P/W masters (equal to them; DeepSpeed 0.19 compares a device with its name and so copies
  them all the same), 8P/W moments, 4P/W gradients, the bucket; frozen weights are partitioned as well, quantisation
  constants are not, tensors up to the persistence threshold stay whole too; gathered parameters up to the larger of
  `stage3_max_live_parameters` and `stage3_max_reuse_distance`.

With the optimizer offloaded, the host holds 20P/W under stage 3 (masters, moments, gradients and where they are
gathered) and 24P/W under stages 1 and 2 (and a buffer for the updated parameters; read in DeepSpeed, not measured).

DeepSpeed's initialisation places the whole 4-bit model on the device before ZeRO-3 partitions it (zero.Init is skipped
for quantised models): `start` is that peak, and a model that does not fit then does not fit.

What is not counted but assumed, and not validated on GPUs: RUNTIME_BYTES for the CUDA context, library workspaces and
NCCL's buffers, and FRAGMENTATION of PyTorch's allocator on top of everything it serves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llara_dist.config import RunConfig
from llara_dist.console import GIB
from llara_dist.cost.activations import activation_bytes
from llara_dist.cost.architecture import Architecture
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import SampleSizes, Work
from llara_dist.cost.zero import ZeroSettings

if TYPE_CHECKING:
    from transformers import LlamaConfig

MIB = 2**20
NF4_BLOCK = 64
NESTED_BLOCK = 256
RUNTIME_BYTES = {"cuda": 1536 * MIB, "cpu": 0}
"""on the device, beside tensors: CUDA context, cuBLAS workspace, NCCL buffers (assumed)"""
HOST_BYTES = {"cuda": 3 * GIB, "cpu": 1 * GIB}
"""of a rank's process on the host: interpreter and libraries (assumed)"""
WORKER_BYTES = 300 * MIB
"""of one reader process (assumed)"""
FRAGMENTATION = 0.05
"""share of a GPU's tensors that the allocator holds beyond them (assumed)"""


@dataclass(frozen=True)
class RunMemory:
    """Peak bytes of one rank.

    Attributes:
        device: by kind, on the rank's device, at the peak of a training step.
        start: on the device while DeepSpeed starts, before ZeRO-3 partitions.
        host: by kind, in the node's memory, for this rank; on a CPU run beside what `device` lists.
    """

    device: dict[str, int]
    start: int
    host: dict[str, int]

    @property
    def device_bytes(self) -> int:
        """What the device must have free."""
        return max(sum(self.device.values()), self.start)

    @property
    def host_bytes(self) -> int:
        """What the node must have free for this rank."""
        return sum(self.host.values())


def estimate_run_memory(
    config: RunConfig,
    llama: LlamaConfig,
    ds_config: dict[str, Any],
    world_size: int,
    item_table: tuple[int, int],
    samples: SampleSizes,
    device_type: str,
    bfloat16: bool,
) -> RunMemory:
    """Memory of one rank of a run, before any weight is read.

    Args:
        config: the run.
        llama: what `read_llama_config` returned.
        ds_config: what `read_ds_config` returned.
        world_size: ranks.
        item_table: (items, d).
        samples: of the shards, `SampleSizes.of(shards.info, shards.longest)`.
        device_type: cuda or cpu.
        bfloat16: whether `compute_dtype(config.model, device)` is bfloat16.

    Returns:
        Bytes. On the CPU the process needs `device_bytes + host_bytes` of its node.

    Raises:
        InputError: lora.targets names what no cost is known for, or ds_config's values have wrong types.
    """
    zero = ZeroSettings.of(ds_config, str(config.deepspeed))
    model = TunedModel.of(config, Architecture.of(llama), item_table, bfloat16, zero.stage)
    share = math.ceil(config.data.global_batch_samples / world_size)
    work = samples.largest_row(config.data.max_tokens_per_microbatch, share, items=item_table[0])
    return run_memory(model, work, zero, world_size, device_type, config.data.workers)


def run_memory(
    model: TunedModel, work: Work, zero: ZeroSettings, world_size: int, device_type: str = "cuda", workers: int = 2
) -> RunMemory:
    """Memory of one rank.

    Args:
        model: what is tuned.
        work: of the largest micro-batch.
        zero: from the ds_config.
        world_size: W.
        device_type: cuda or cpu.
        workers: reader processes of the rank.
    """
    shape = model.architecture
    frozen = frozen_bytes(model, zero if zero.stage == 3 else ZeroSettings(), world_size)
    whole = frozen_bytes(model, ZeroSettings(), 1)
    trained, offloaded = trained_bytes(model, zero, world_size)
    activations = activation_bytes(model, work, device_type)
    device = {
        **frozen,
        **trained,
        "item table": 4 * model.items * model.item_dim,
        "activations": activations.total,
        "workspace": activations.workspace,
    }
    start = sum(whole.values()) + 4 * model.trainable + device["item table"]
    if device_type == "cuda":
        device["allocator"] = math.ceil(FRAGMENTATION * sum(device.values()))
    device["runtime"] = RUNTIME_BYTES[device_type]
    host = {"process": HOST_BYTES[device_type], "readers": workers * WORKER_BYTES, "offloaded": offloaded}
    if zero.offload_parameters:
        host["offloaded"] += device.pop("packed weights") + device.pop("unquantised weights")
    if zero.stage == 3 and device_type == "cuda":
        host["model before partitioning"] = sum(whole.values())
    elif device_type == "cuda":
        host["model being read"] = 4 * max(shape.embedding_weights, shape.hidden * shape.intermediate)
    return RunMemory(device, start + RUNTIME_BYTES[device_type], host)


def element_bytes(model: TunedModel) -> int:
    """Bytes of an element of the frozen tensors that are not packed: embedding, norms, head, biases."""
    return 2 if model.bits == 16 or (model.bits == 4 and model.bfloat16) else 4


def frozen_bytes(model: TunedModel, zero: ZeroSettings, world_size: int) -> dict[str, int]:
    """The language model's own weights on one rank, and what ZeRO-3 has gathered of them at a time."""
    shape, held = model.architecture, element_bytes(model)
    linears = [linear.weights for linear in shape.linears] * shape.layers
    others = [shape.embedding_weights, shape.head_weights, *[shape.hidden] * (2 * shape.layers + 1), shape.biases]
    others = [count for count in others if count]
    constants = 0
    if model.bits == 4:
        blocks = [math.ceil(count / NF4_BLOCK) for count in linears]
        constants = sum(count + 4 * math.ceil(count / NESTED_BLOCK) + 4 * (NESTED_BLOCK + 16 + 1) for count in blocks)
    # Packed weights count as one element a byte to DeepSpeed's limits (quant_storage uint8).
    packed = [math.ceil(count / 2) if model.bits == 4 else count for count in linears]
    size = 1 if model.bits == 4 else held
    if zero.stage < 3:
        return {
            "packed weights": size * sum(packed),
            "quantisation constants": constants,
            "unquantised weights": held * sum(others),
        }

    def on_rank(counts: list[int]) -> int:
        return sum(math.ceil(n / world_size) + (n if n <= zero.persistence else 0) for n in counts)

    elements = sum(n for n in packed + others if n > zero.persistence)
    everything = sum(size * n for n in packed if n > zero.persistence)
    everything += sum(held * n for n in others if n > zero.persistence)
    live = min(1.0, max(zero.max_live, zero.max_reuse_distance) / elements) if elements else 0.0
    return {
        "packed weights": size * on_rank(packed),
        "quantisation constants": constants,
        "unquantised weights": held * on_rank(others),
        "gathered weights": math.ceil(live * everything) if world_size > 1 else 0,
    }


def trained_bytes(model: TunedModel, zero: ZeroSettings, world_size: int) -> tuple[dict[str, int], int]:
    """Parameters, gradients, moments and buffers of what trains: by kind on the device, and bytes on the host."""
    whole = 4 * model.trainable
    part = math.ceil(whole / world_size)
    bucket = 4 * zero.reduce_bucket * (2 if zero.overlap and zero.stage < 3 else 1) if zero.contiguous else 0
    if zero.stage == 0:
        flattened = whole if world_size > 1 else 0
        return {"trained": whole, "gradients": whole, "moments": 2 * whole, "communication": flattened}, 0
    if zero.stage == 3:
        sizes = model.architecture.layers * model.adapter_sizes + model.projector_sizes
        persistent = 4 * sum(size for size in sizes if size <= zero.persistence)
        held = {"trained": persistent, "gradients": 0, "moments": 0, "communication": bucket}
        if not zero.offload_optimizer:
            held = {**held, "trained": persistent + 2 * part, "gradients": part, "moments": 2 * part}
            return held, 0
        return {**held, "trained": persistent + part}, 5 * part
    if zero.offload_optimizer:
        return {"trained": whole, "gradients": part, "moments": 0, "communication": bucket}, 6 * part
    gradients = whole if zero.stage == 1 else part
    return {"trained": whole + part, "gradients": gradients, "moments": 2 * part, "communication": bucket}, 0
