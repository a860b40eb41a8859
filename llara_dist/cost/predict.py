"""Time of one optimizer step, from its arithmetic, its memory traffic and its communication.

A step is M micro-batches, then the optimizer. Parts are added, since DeepSpeed overlaps little of them as configured:

- matrix products: hardware FLOPs ÷ (peak × `compute`), the peak of bfloat16 or float32 as the run multiplies;
- element-wise work: TOUCHES × the activations that a forward pass saves ÷ (memory bandwidth × `bandwidth`);
- dequantisation, per use of the weights (forward, backward, recomputation): reading half a byte an element, writing and
  reading it again in the compute type;
- optimizer: seven float32 accesses an element of the rank's part (whole under stage 0);
- launching kernels is what a micro-batch takes at least: KERNELS a layer and pass × LAUNCH_S (GPUs only);
- communication, α–β: ring bytes (`Traffic.sent`) ÷ the slower of the links, plus a latency a collective and level of a
  tree. Within a node the links are `intra_node`; across nodes all of a node's network ports work together.

The efficiencies are assumptions (DEFAULT), not measurements; no GPU has confirmed them here. Waiting for data, uneven
ranks, stragglers and the host's work for ZeRO-3's hooks are not modelled. `benchmarks/cost.py` holds the model against
real steps on CPU ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llara_dist.cost.activations import activation_bytes
from llara_dist.cost.communication import SCALARS, step_traffic
from llara_dist.cost.flops import StepFlops, step_flops
from llara_dist.cost.hardware import Hardware
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import SampleSizes, Work
from llara_dist.cost.zero import ZeroSettings

TOUCHES = 5.0
"""accesses of a saved activation: written, read backward, its gradient written and read, and the copies between"""
KERNELS = 120
"""kernels that eager PyTorch launches for a layer's forward pass; twice as many for its backward pass"""
LAUNCH_S = 5e-6
INTRA_LATENCY_S = 15e-6
INTER_LATENCY_S = 30e-6


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that real kernels reach.

    Attributes:
        compute: of the peak FLOP/s, over all matrix products, the adapters' thin ones included.
        bandwidth: of the memory bandwidth.
        links: of the links' bandwidth.
    """

    compute: float = 0.55
    bandwidth: float = 0.7
    links: float = 0.7


DEFAULT = Efficiency()


@dataclass(frozen=True)
class Cluster:
    """Where a run computes.

    Attributes:
        hardware: of every rank.
        ranks: W.
        ranks_per_node: of a full node.
    """

    hardware: Hardware
    ranks: int
    ranks_per_node: int = 8

    @property
    def nodes(self) -> int:
        """Nodes in use."""
        return math.ceil(self.ranks / self.ranks_per_node)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by part, and what they are made of.

    Attributes:
        products: matrix products.
        elementwise: everything that memory bandwidth bounds.
        dequantisation: NF4 → compute type.
        launching: what kernel launches add where they take longer than the kernels.
        optimizer: AdamW.
        communication: collectives.
        microbatches: M.
        tokens: of the global step.
        samples: of the global step.
        sent_bytes: that a rank sends.
        collectives: calls, scalars included.
        flops: of one rank.
        peak: FLOP/s of a rank's hardware in the compute type.
    """

    products: float
    elementwise: float
    dequantisation: float
    launching: float
    optimizer: float
    communication: float
    microbatches: int
    tokens: int
    samples: int
    sent_bytes: float
    collectives: int
    flops: StepFlops
    peak: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        parts = (self.products, self.elementwise, self.dequantisation, self.launching)
        return sum(parts) + self.optimizer + self.communication

    @property
    def tokens_per_s(self) -> float:
        """Over all ranks."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation."""
        return self.flops.model / self.seconds / self.peak


def predict_step(
    model: TunedModel,
    zero: ZeroSettings,
    cluster: Cluster,
    samples: SampleSizes,
    global_batch: int,
    tokens_per_microbatch: int,
    efficiency: Efficiency = DEFAULT,
) -> StepTime:
    """Predict one optimizer step in steady state.

    Args:
        model: what is tuned.
        zero: from the ds_config.
        cluster: hardware, ranks and nodes.
        samples: lengths of a sample.
        global_batch: samples of a step, over all ranks.
        tokens_per_microbatch: budget of a packed row.
        efficiency: assumed shares of the peaks.
    """
    per_row = max(1, tokens_per_microbatch // samples.mean)
    of_rank = math.ceil(global_batch / cluster.ranks)
    microbatches = math.ceil(of_rank / per_row)
    row = samples.row(math.ceil(of_rank / microbatches) * samples.mean, model.items)
    work = Work(**{name: count * microbatches for name, count in vars(row).items()})
    parts = compute_seconds(model, zero, cluster, row, microbatches, efficiency)
    traffic = step_traffic(model, zero, cluster.ranks, microbatches)
    collectives = traffic.calls.total() + SCALARS if cluster.ranks > 1 else 0
    return StepTime(
        **parts,
        communication=communication_seconds(cluster, traffic.sent(cluster.ranks), collectives, efficiency),
        microbatches=microbatches,
        tokens=global_batch * samples.mean,
        samples=global_batch,
        sent_bytes=traffic.sent(cluster.ranks),
        collectives=collectives,
        flops=step_flops(model, work),
        peak=cluster.hardware.peak(model.bfloat16),
    )


def compute_seconds(
    model: TunedModel, zero: ZeroSettings, cluster: Cluster, row: Work, microbatches: int, efficiency: Efficiency
) -> dict[str, float]:
    """Seconds of a step's parts on the device, by the names of `StepTime`.

    Args:
        model: what is tuned.
        zero: from the ds_config.
        cluster: hardware and ranks.
        row: sizes of one micro-batch.
        microbatches: of a step.
        efficiency: assumed shares of the peaks.
    """
    hardware, shape = cluster.hardware, model.architecture
    bandwidth = hardware.memory_bandwidth * efficiency.bandwidth
    products = step_flops(model, row).hardware / (hardware.peak(model.bfloat16) * efficiency.compute)
    activations = activation_bytes(model, row, hardware.device_type)
    saved = activations.layers + activations.outside
    again = model.recomputed / shape.layers
    elementwise = TOUCHES * saved * (1 + again / 3) / bandwidth
    unpacked = shape.linear_weights * (0.5 + 2 * model.compute_bytes) if model.bits == 4 else 0.0
    dequantisation = (2 + again) * unpacked / bandwidth
    device = products + elementwise + dequantisation
    kernels = KERNELS * shape.layers * (3 + again)
    launching = max(0.0, kernels * LAUNCH_S - device) if hardware.device_type == "cuda" else 0.0
    part = model.trainable / (1 if zero.stage == 0 else cluster.ranks)
    return {
        "products": microbatches * products,
        "elementwise": microbatches * elementwise,
        "dequantisation": microbatches * dequantisation,
        "launching": microbatches * launching,
        "optimizer": 7 * 4 * part / bandwidth,
    }


def communication_seconds(cluster: Cluster, sent_bytes: float, collectives: int, efficiency: Efficiency) -> float:
    """α–β: bytes ÷ the slower link, and a latency a collective and level of a tree over ranks and nodes."""
    if cluster.ranks == 1:
        return 0.0
    hardware = cluster.hardware
    in_node = min(cluster.ranks, cluster.ranks_per_node)
    link = hardware.intra_node
    latency = INTRA_LATENCY_S * math.ceil(math.log2(in_node)) if in_node > 1 else 0.0
    if cluster.nodes > 1:
        link = min(link, in_node * hardware.inter_node) if in_node > 1 else hardware.inter_node
        latency += INTER_LATENCY_S * math.ceil(math.log2(cluster.nodes))
    return sent_bytes / (link * efficiency.links) + collectives * latency
