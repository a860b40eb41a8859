"""What can be known to be wrong before any weight is read: everything at once."""

from __future__ import annotations

import dataclasses
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llara_dist import distributed
from llara_dist.config import RunConfig
from llara_dist.console import GIB, say, table, warn
from llara_dist.cost.architecture import Architecture
from llara_dist.cost.memory import estimate_run_memory
from llara_dist.cost.tuned import TunedModel
from llara_dist.cost.work import SampleSizes
from llara_dist.distributed import World
from llara_dist.ds_config import CHECK, check_ds_config, load_ds_config, zero_stage
from llara_dist.errors import Finding, InputError
from llara_dist.model.kernels import CHECK_HERE, Kernels, chooser, settle_memory
from llara_dist.model.llama import compute_dtype, read_llama_config
from llara_dist.recommenders.item_table import ItemTable, load_item_table
from llara_dist.stream.locations import is_remote, node_cache, open_samples
from llara_dist.stream.plan import Plan
from llara_dist.stream.reader import Samples
from llara_dist.stream.share import check_world
from llara_dist.training import debug
from llara_dist.training.checkpoints.checkpoint import Checkpoint, newest_checkpoint
from llara_dist.training.contract import check_contract, contract_of
from llara_dist.training.preflight import resources
from llara_dist.training.preflight.base_model import check_weight_files, held_as
from llara_dist.training.preflight.checklist import Checklist
from llara_dist.training.preflight.consistency import (
    check_context,
    check_recommender,
    check_tokenizer,
    check_zero_section,
)
from llara_dist.training.preflight.versions import check_versions, installed_versions
from llara_dist.training.trackers import check_tracking

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig

BYTES_SAVED = 16
"""a trained number in a checkpoint: float32 master, two moments, and the copy in the adapter or projector file"""


@dataclass(frozen=True)
class Inputs:
    """Everything a run stands on, opened and found consistent.

    Attributes:
        shards: the training samples.
        plan: which samples make which step.
        item_table: behaviour embeddings before projection.
        ds_config: as DeepSpeed will get it, less what is ours.
        checkpoint: to go on from, or None.
        total_steps: T.
        contract: what must not change between a start and its resumption; the checkpoint has the same.
    """

    shards: Samples
    plan: Plan
    item_table: ItemTable
    ds_config: dict[str, Any]
    checkpoint: Checkpoint | None
    total_steps: int
    contract: dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """Where a rank runs.

    Attributes:
        world: its place among the ranks.
        local_ranks: ranks on its node.
        device: that it computes on.
    """

    world: World
    local_ranks: int
    device: torch.device


def open_inputs(config: RunConfig, world: World) -> Inputs:
    """Open shards, item table, ds_config and checkpoint, and check that they and the machine suit each other.

    Every rank calls it, before any is joined to another. Rank 0 says what is worth a warning.

    Args:
        config: the run.
        world: where this process stands.

    Raises:
        FindingsError: everything that was found wrong, with what to do about each.
    """
    checks, inputs = examine(config, world, distributed.local_size(world))
    if world.is_main:
        for finding in checks.of("warning"):
            warn(finding.line)
    checks.raise_errors(world.local_rank)
    assert inputs is not None
    return inputs


def preflight(config: RunConfig, ranks: int = 0) -> dict[str, Any]:
    """Check a run without starting it: all that `train` checks before it reads a weight. Nothing is written.

    Args:
        config: the run.
        ranks: check for so many ranks, on this node as many as it has GPUs; 0 = for those that were started.

    Returns:
        Every finding, also of checks that passed.

    Raises:
        FindingsError: one or more checks failed.
    """
    world = distributed.read_world()
    local_ranks = distributed.local_size(world)
    if ranks < 0:
        raise InputError(f"--ranks={ranks}: must not be negative")
    if ranks:
        if world.size > 1:
            raise InputError(f"--ranks is for a single process, {world.size} were started; leave it out")
        import torch

        world = dataclasses.replace(world, size=ranks)
        local_ranks = min(ranks, torch.cuda.device_count() or ranks)
    checks, _ = examine(config, world, local_ranks)
    if world.is_main:
        rows = ([finding.check, finding.severity, finding.found, finding.remedy] for finding in checks.findings)
        title = f"{config.out} on {world.size} rank{'s' if world.size > 1 else ''}"
        table(title, ["check", "", "found", "what to do"], rows)
    checks.raise_errors(world.local_rank, shown=world.is_main)
    if world.is_main:
        say("nothing stands in the way of this run")
    return {"findings": [dataclasses.asdict(finding) for finding in checks.findings]}


def examine(config: RunConfig, world: World, local_ranks: int) -> tuple[Checklist, Inputs | None]:
    """Run every check; the inputs are None where a check failed.

    Args:
        config: the run.
        world: where this process stands.
        local_ranks: ranks on this node.
    """
    checks = Checklist()
    checks.run("inputs", config.require_inputs)
    device = _examine_machine(checks, config, world)
    ds_config = _examine_ds_config(checks, config.deepspeed, device)

    model = config.model if config.model.path else None
    architecture = checks.run("model", read_llama_config, model, passed=_describe)
    checks.run(CHECK_HERE, _kernels, config, device, ds_config, after=[architecture], passed=str)
    weights = checks.run("weight files", check_weight_files, model, architecture, passed=str)
    checks.run("storage dtype", held_as, model, architecture, passed=str)

    cache = node_cache(config.data)
    location = config.data.shards or None
    shards = checks.run("shards", open_samples, location, "train", cache, passed=lambda s: f"{len(s):,} samples")
    if config.validation.every_steps:
        checks.run("validation", open_samples, location, "val", cache, passed=lambda s: f"{len(s):,} rows")
    checks.run("tokenizer", check_tokenizer, config, shards, after=[architecture], passed=lambda _: "the shards' own")
    checks.run("context", check_context, config, architecture, shards, passed=lambda n: f"{n} tokens hold every row")

    folder = config.recommender.path if config.recommender.path != Path() else None
    item_table = checks.run("item table", load_item_table, folder, passed=lambda t: f"{t.info['num_items']} items")
    checks.run("recommender", check_recommender, config, shards, item_table, passed=lambda _: "of the shards' data set")

    plan = _examine_batch(checks, config, world, local_ranks, shards)
    total_steps = None if plan is None else min(plan.num_steps, config.data.max_steps or plan.num_steps)
    checks.run("tracking", check_tracking, config.tracking, world.is_main)
    checks.run("output folder", check_out, config, passed=lambda _: str(config.out))
    checkpoint = None
    contract = checks.run("base model", contract_of, config, plan, item_table, total_steps, after=[weights])
    if config.resume == "auto":
        checkpoint = newest_checkpoint(config.out / "checkpoints")
        checks.note("checkpoint", f"{checkpoint.path}" if checkpoint else "none yet: the run starts at step 0")
    if checkpoint is not None:
        checks.run("fingerprint", check_contract, checkpoint, contract, passed=lambda _: "the checkpoint's run")
    machine = None if device is None else Machine(world, local_ranks, device)
    tuned = checks.run("trained", _tuned, config, machine, architecture, item_table, passed=_describe_trained)
    checks.run("disk", _examine_disk, checks, config, tuned)
    checks.run("memory", _examine_memory, checks, config, machine, architecture, tuned, ds_config, shards)

    if checks.of("error"):
        return checks, None
    assert shards is not None
    assert plan is not None
    assert item_table is not None
    assert ds_config is not None
    assert contract is not None
    assert total_steps is not None
    return checks, Inputs(shards, plan, item_table, ds_config, checkpoint, total_steps, contract)


def check_out(config: RunConfig) -> None:
    """No other run lies in the run's folder.

    Raises:
        InputError: one does, and this one is not to go on from it.
    """
    holds_run = any((config.out / name).exists() for name in ("metrics.jsonl", "checkpoints"))
    if config.resume == "no" and holds_run and not (config.out / debug.MARK).is_dir():
        raise InputError(f"{config.out}: holds a run already; choose another --out, or go on with --resume auto")


def _describe(architecture: LlamaConfig) -> str:
    return f"Llama of {architecture.num_hidden_layers} layers, width {architecture.hidden_size}"


def _examine_machine(checks: Checklist, config: RunConfig, world: World) -> torch.device | None:
    """The device, what it computes in, and the versions of the libraries; None where DeepSpeed had better not start."""
    device = checks.run("device", distributed.pick_device, config.device, world, passed=str)
    on_gpu = device is not None and device.type == "cuda"
    installed = installed_versions()
    sound = checks.extend(check_versions(installed, on_gpu))
    if sound:
        checks.note("versions", ", ".join(f"{name} {version}" for name, version in installed.items() if version))
    dtype = checks.run("compute dtype", compute_dtype, config.model, device, passed=lambda d: str(d).split(".")[1])
    if device is not None and device.type == "cpu":
        checks.extend(resources.check_bf16(str(dtype) == "torch.bfloat16", resources.cpu_has_bf16()))
    return device if sound else None


def _kernels(config: RunConfig, device: torch.device, ds_config: dict[str, Any]) -> Kernels:
    """What `train` will compute with; every field that the ZeRO stage, or this machine, rules out."""
    return chooser(config.model, device, zero_stage(ds_config))(config.kernels)


def _examine_ds_config(checks: Checklist, path: Path, device: torch.device | None) -> dict[str, Any] | None:
    """The ds_config, None where something in it would fight the run."""
    ds_config = checks.run(CHECK, load_ds_config, path)
    if ds_config is None:
        return None
    findings = check_ds_config(ds_config, str(path))
    if device is not None:
        findings += check_zero_section(ds_config, str(path), device, findings)
    if not checks.extend(findings):
        return None
    checks.note(CHECK, f"{path}: ZeRO-{zero_stage(ds_config)}")
    return ds_config


def _examine_batch(
    checks: Checklist, config: RunConfig, world: World, local_ranks: int, shards: Samples | None
) -> Plan | None:
    """The arithmetic of steps, batch, budget and ranks."""
    data = config.data
    ranks = f"{world.size}, {local_ranks} on this node"
    checks.run("ranks", check_world, 0, data.global_batch_samples, world.size, 1, passed=lambda _: ranks)
    if shards is None:
        return None
    longest = f"the longest row has {shards.longest} tokens"
    checks.run(
        "token budget", check_world, shards.longest, 1, 1, data.max_tokens_per_microbatch, passed=lambda _: longest
    )
    nodes = -(-world.size // local_ranks)
    if is_remote(shards) and data.lanes < nodes:
        found = f"data.lanes={data.lanes} for {nodes} nodes: some fetch the same shards"
        checks.extend([Finding("lanes", found, f"set data.lanes to a power of two from {nodes} on", "warning")])
    checks.extend(resources.check_open_files(len(shards.sources)))
    return checks.run(
        "plan",
        Plan,
        shards.sources,
        config.seed,
        data.global_batch_samples,
        data.epochs,
        data.lanes,
        passed=lambda plan: f"{plan.num_steps:,} steps of {data.global_batch_samples} samples",
    )


def _describe_trained(tuned: TunedModel) -> str:
    return f"{tuned.trainable:,} parameters of LoRA and projector"


def _tuned(config: RunConfig, machine: Machine, architecture: LlamaConfig, item_table: ItemTable) -> TunedModel:
    bfloat16 = str(compute_dtype(config.model, machine.device)) == "torch.bfloat16"
    items, width = item_table.weight.shape
    return TunedModel.of(config, Architecture.of(architecture), (items, width), bfloat16)


def _examine_disk(checks: Checklist, config: RunConfig, tuned: TunedModel) -> None:
    """Whether the disk holds the checkpoints: those that stay, the best by validation, and the one being written."""
    one = BYTES_SAVED * tuned.trainable
    there = sum(file.stat().st_size for file in (config.out / "checkpoints").glob("step-*/*"))
    need = max(one, one * (config.checkpoint.keep_last + 2) - there)
    if checks.extend(resources.check_disk(config.out, need)):
        checks.note("disk", f"{need / GIB:.2f} GiB of checkpoints to come at most")


def _examine_memory(
    checks: Checklist,
    config: RunConfig,
    machine: Machine,
    architecture: LlamaConfig,
    tuned: TunedModel,
    ds_config: dict[str, Any],
    shards: Samples,
) -> None:
    """Whether memory holds a rank on its device, and the node's ranks on their host."""
    kernels = settle_memory(config.kernels, machine.device, zero_stage(ds_config))
    memory = estimate_run_memory(
        dataclasses.replace(config, kernels=kernels),
        architecture,
        ds_config,
        machine.world.size,
        (tuned.items, tuned.item_dim),
        SampleSizes.of(shards.info, shards.longest),
        machine.device.type,
        tuned.bfloat16,
    )
    device_free, host_free = resources.free_device_bytes(machine.device), resources.free_host_bytes()
    where = f"rank {machine.world.rank} on {socket.gethostname()}"
    findings = resources.check_memory(
        memory.device_bytes, memory.host_bytes, device_free, host_free, machine.local_ranks, where
    )
    if checks.extend(findings):
        on_device = "" if device_free is None else f" of {device_free / GIB:.1f} free"
        needs = (
            f"{memory.device_bytes / GIB:.1f} GiB{on_device} on its device, {memory.host_bytes / GIB:.1f} GiB beside"
        )
        checks.note("memory", f"a rank needs about {needs}; the node has {host_free / GIB:.1f} GiB free")
