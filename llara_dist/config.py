"""The configuration of a run: frozen dataclasses ← YAML ← dotted overrides, checked where they are made.

Defaults are the paper's for Llama-2-7B on MovieLens (LLaRA, arXiv 2312.02445 v4, section 4.1) where it states one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llara_dist.errors import Finding, FindingsError, InputError


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise InputError(message)


@dataclass(frozen=True)
class ModelConfig:
    """The frozen language model and how it is held.

    Attributes:
        path: folder or hub id of a Llama-architecture model with its tokenizer; with bits=4 also what
            `llara-dist quantize` made of one, which is loaded without quantising again.
        revision: hub revision (branch, tag or commit); ignored for a folder.
        bits: 4 = NF4 with double quantisation (bitsandbytes), 16 = bfloat16, 32 = float32.
        compute_dtype: what matrix products run in; auto = bfloat16 where the device has it, else float32.
        quant_storage: dtype that holds the packed 4-bit weights; uint8 or the dtype DeepSpeed trains in (float32).
        attention: packed = variable-length attention over the packed row; sdpa, eager = transformers' own.
        activation_checkpointing: recompute layers in the backward pass: less memory, for all of them about a third more
            time. true = all; a number = so many, the first ones; auto = as few as `memory_target_gib` needs, decided
            before weights are read (on the CPU none).
        memory_target_gib: memory of a GPU that `activation_checkpointing=auto` may use; 0 = what is free, less a
            margin.
    """

    path: str = ""
    revision: str | None = None
    bits: Literal[4, 16, 32] = 4
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quant_storage: Literal["uint8", "float16", "bfloat16", "float32"] = "uint8"
    attention: Literal["packed", "sdpa", "eager"] = "packed"
    activation_checkpointing: bool | int | Literal["auto"] = False
    memory_target_gib: float = 0.0

    def __post_init__(self) -> None:
        _require(
            self.bits != 4 or self.quant_storage in ("uint8", "float32"),
            f"model.quant_storage={self.quant_storage}: packed 4-bit weights must be stored in uint8 or in the "
            "dtype that DeepSpeed trains in (float32 here); another float dtype is cast by value and "
            "silently corrupts them; set model.quant_storage=uint8",
        )
        _require(
            not (self.bits == 16 and self.compute_dtype == "float32"),
            "model.bits=16 holds bfloat16 weights, model.compute_dtype=float32 does not match; use model.bits=32",
        )
        layers = self.activation_checkpointing
        _require(
            layers == "auto" or (isinstance(layers, int) and layers >= 0),
            f"model.activation_checkpointing={layers}: must be true, false, auto or a number of layers",
        )
        _require(self.memory_target_gib >= 0, f"model.memory_target_gib={self.memory_target_gib}: must not be negative")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021) on the language model's linear layers, in float32.

    Attributes:
        rank: r.
        alpha: α; the update is scaled by α/r.
        dropout: probability on the adapter's input.
        targets: names of the linear layers that get an adapter.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        _require(self.rank >= 1, f"lora.rank={self.rank}: must be at least 1")
        _require(0.0 <= self.dropout < 1.0, f"lora.dropout={self.dropout}: must be in [0, 1)")
        _require(len(self.targets) > 0, "lora.targets is empty: name at least one linear layer")


@dataclass(frozen=True)
class ProjectorConfig:
    """The map from item table to the language model's input space: Linear, GELU, Linear, with biases, in float32.

    Attributes:
        hidden_dim: width between the two layers; 0 = the language model's hidden size, as in the paper.
        init: embedding_scale = the last layer is scaled once so that behaviour embeddings start with the root mean
            square of the model's token embeddings; default = torch's own initialisation.
    """

    hidden_dim: int = 0
    init: Literal["embedding_scale", "default"] = "embedding_scale"

    def __post_init__(self) -> None:
        _require(self.hidden_dim >= 0, f"projector.hidden_dim={self.hidden_dim}: must not be negative")


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementation computes; none of them changes a result beyond rounding (dropout's draws apart).

    What `auto` came to is printed at the start (`model/kernels.py`).

    Attributes:
        attention: of packed rows, where model.attention=packed: flash3, flash2 = the flash-attn package; varlen =
            torch.nn.attention.varlen; sdpa = scaled-dot-product attention, sample by sample.
        projector: triton = one fused op; eager = PyTorch's ops one after the other.
        lora: fused = one op around each linear layer; peft = PEFT's own forward pass.
        layers: liger = Liger kernels for RMSNorm, RoPE and SwiGLU; torch = transformers' own.
        last_layer: answers = the last layer computes only what the answers' predictions need; all = every position.
        compile: torch.compile of the decoder layers; needs a C++ compiler on every node.
    """

    attention: Literal["auto", "flash3", "flash2", "varlen", "sdpa"] = "auto"
    projector: Literal["auto", "triton", "eager"] = "auto"
    lora: Literal["auto", "fused", "peft"] = "auto"
    layers: Literal["auto", "liger", "torch"] = "auto"
    last_layer: Literal["answers", "all"] = "answers"
    compile: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how they are read.

    Attributes:
        shards: what `llara-dist shards build` or `shards mix` made: a path, or a URL (https://, s3://, gs://).
        epochs: passes over the training samples.
        max_steps: stop the plan (and the schedules' horizon T) after so many optimizer steps; 0 = all epochs.
        global_batch_samples: samples an optimizer step, over all ranks.
        max_tokens_per_microbatch: token budget of one packed row, one forward and backward pass of one rank.
        workers: reader processes a rank; 0 = read in the training process.
        cache: folder on the node's own disk for copies of shards at a URL; by default one under $TMPDIR.
        cache_limit_gib: most that the cache may hold; 0 = no limit.
        lookahead_gib: how far shards are fetched ahead of the steps, beyond those in use.
        lanes: streams that every step draws from equally, a power of two; a node reads its own lanes, so not fewer than
            nodes. It is part of the plan: a run cannot be resumed with another number.
    """

    shards: str = ""
    epochs: int = 5
    max_steps: int = 0
    global_batch_samples: int = 128
    max_tokens_per_microbatch: int = 8192
    workers: int = 2
    cache: Path = Path()
    cache_limit_gib: float = 0.0
    lookahead_gib: float = 4.0
    lanes: int = 128

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, f"data.epochs={self.epochs}: must be at least 1")
        _require(self.max_steps >= 0, f"data.max_steps={self.max_steps}: must not be negative")
        _require(self.global_batch_samples >= 1, f"data.global_batch_samples={self.global_batch_samples}: at least 1")
        _require(self.max_tokens_per_microbatch >= 8, "data.max_tokens_per_microbatch: must be at least 8 tokens")
        for name in ("workers", "cache_limit_gib", "lookahead_gib"):
            _require(getattr(self, name) >= 0, f"data.{name}={getattr(self, name)}: must not be negative")
        lanes = self.lanes
        _require(lanes >= 1 and lanes & (lanes - 1) == 0, f"data.lanes={lanes}: must be a power of two")


@dataclass(frozen=True)
class RecommenderConfig:
    """The frozen sequential recommender whose item embeddings become behaviour tokens.

    Attributes:
        path: folder made by `llara-dist recommender train` (item_table.safetensors + recommender.json).
    """

    path: Path = Path()


@dataclass(frozen=True)
class CurriculumConfig:
    """How likely a sample is hybrid at step τ of T (paper, section 3.4).

    Attributes:
        schedule: linear = τ/T; two_stage = 0 before `switch` · T, then 1; constant = `probability` throughout;
            cosine = (1 − cos(πτ/T))/2; sqrt = √(τ/T).
        probability: of the constant schedule: 0 = text-only tuning, 1 = direct hybrid tuning.
        switch: of the two_stage schedule, as a share of T (the paper: 2 of 5 epochs).
    """

    schedule: Literal["linear", "two_stage", "constant", "cosine", "sqrt"] = "linear"
    probability: float = 1.0
    switch: float = 0.4

    def __post_init__(self) -> None:
        _require(0.0 <= self.probability <= 1.0, f"curriculum.probability={self.probability}: must be in [0, 1]")
        _require(0.0 <= self.switch <= 1.0, f"curriculum.switch={self.switch}: must be in [0, 1]")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW over two parameter groups, LoRA and projector, with warm-up and cosine counted in optimizer steps.

    Attributes:
        lora_lr: peak learning rate of the adapters.
        projector_lr: peak learning rate of the projector.
        lora_weight_decay: decoupled weight decay of the adapters.
        projector_weight_decay: decoupled weight decay of the projector (paper: 1e-5).
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        warmup_fraction: share of all steps over which the rate rises linearly from `floor` × peak.
        floor: the lowest rate, as a share of the peak, at the start and at the end (paper: 1/100).
        max_grad_norm: global norm to which gradients are clipped; 0 = off.
    """

    lora_lr: float = 8e-4
    projector_lr: float = 8e-4
    lora_weight_decay: float = 0.0
    projector_weight_decay: float = 1e-5
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    warmup_fraction: float = 0.05
    floor: float = 0.01
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lora_lr", "projector_lr"):
            _require(getattr(self, name) > 0, f"optimizer.{name}={getattr(self, name)}: must be positive")
        for name in ("beta1", "beta2"):
            _require(0.0 <= getattr(self, name) < 1.0, f"optimizer.{name}={getattr(self, name)}: must be in [0, 1)")
        for name in ("epsilon", "lora_weight_decay", "projector_weight_decay"):
            _require(getattr(self, name) >= 0, f"optimizer.{name}={getattr(self, name)}: must not be negative")
        _require(0.0 <= self.warmup_fraction < 1.0, f"optimizer.warmup_fraction={self.warmup_fraction}: in [0, 1)")
        _require(0.0 <= self.floor <= 1.0, f"optimizer.floor={self.floor}: must be in [0, 1]")
        _require(self.max_grad_norm >= 0, f"optimizer.max_grad_norm={self.max_grad_norm}: must not be negative")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved.

    Attributes:
        every_steps: optimizer steps between checkpoints; 0 = only at the end.
        keep_last: how many of the newest checkpoints stay; the best by validation stays beside them.
        asynchronous: write in the background while the steps go on; false = wait for every write.
    """

    every_steps: int = 500
    keep_last: int = 2
    asynchronous: bool = True

    def __post_init__(self) -> None:
        _require(self.every_steps >= 0, f"checkpoint.every_steps={self.every_steps}: must not be negative")
        _require(self.keep_last >= 1, f"checkpoint.keep_last={self.keep_last}: must be at least 1")


@dataclass(frozen=True)
class ValidationConfig:
    """Validation while training runs; it touches neither the order of samples nor any generator.

    Attributes:
        every_steps: optimizer steps between validations; 0 = none. The end of the run is validated as well.
        rows: only the first rows of the validation split by key; 0 = all.
        generation: HR@1 by free greedy generation (exact protocol); false = by the candidates' likelihood.
        max_new_tokens: longest generated answer, EOS included.
        batch_size: rows a rank computes at once.
        patience: stop early after so many validations in a row without a better one; 0 = never.
    """

    every_steps: int = 0
    rows: int = 0
    generation: bool = True
    max_new_tokens: int = 64
    batch_size: int = 16
    patience: int = 0

    def __post_init__(self) -> None:
        for name in ("every_steps", "rows", "patience"):
            _require(getattr(self, name) >= 0, f"validation.{name}={getattr(self, name)}: must not be negative")
        for name in ("max_new_tokens", "batch_size"):
            _require(getattr(self, name) >= 1, f"validation.{name}={getattr(self, name)}: must be at least 1")
        _require(
            self.patience == 0 or self.every_steps > 0,
            f"validation.patience={self.patience} needs validations: set validation.every_steps",
        )


@dataclass(frozen=True)
class FaultsConfig:
    """What happens when something goes wrong.

    Attributes:
        max_skipped_steps: the run stops when more steps than this were skipped, on all ranks together, because a loss
            or a gradient was not finite.
        hang_timeout_s: after so many seconds without progress a rank reports who hangs, with stacks, and stops.
        heartbeat_s: seconds between the signs of life of ranks and of the run's lock.
        spike_deviations: a loss so many standard deviations above its recent mean is logged with its sample keys;
            0 = never.
    """

    max_skipped_steps: int = 10
    hang_timeout_s: float = 900.0
    heartbeat_s: float = 5.0
    spike_deviations: float = 6.0

    def __post_init__(self) -> None:
        for name in ("max_skipped_steps", "spike_deviations"):
            _require(getattr(self, name) >= 0, f"faults.{name}={getattr(self, name)}: must not be negative")
        _require(self.heartbeat_s > 0, f"faults.heartbeat_s={self.heartbeat_s}: must be positive")
        _require(
            self.hang_timeout_s > 2 * self.heartbeat_s,
            f"faults.hang_timeout_s={self.hang_timeout_s}: must be more than twice faults.heartbeat_s",
        )


@dataclass(frozen=True)
class TrackingConfig:
    """Where the numbers of metrics.jsonl and validation.jsonl go as well; keys and addresses are the trackers' own.

    Attributes:
        tensorboard: event files in OUT/tensorboard.
        wandb: a Weights & Biases project; "" = none. WANDB_MODE=offline writes to OUT/wandb only.
        mlflow: an MLflow experiment at MLFLOW_TRACKING_URI; "" = none.
        name: of the run there; "" = the name of its folder.
    """

    tensorboard: bool = True
    wandb: str = ""
    mlflow: str = ""
    name: str = ""


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Attributes:
        model: the frozen language model.
        lora: the adapters.
        projector: item table → input space.
        kernels: which implementation computes.
        recommender: where behaviour embeddings come from.
        data: samples, batch and token budget.
        curriculum: text-only → hybrid.
        optimizer: rates and decay.
        checkpoint: when to save.
        validation: when to validate, and when to stop early.
        faults: limits for steps that are skipped and ranks that hang.
        tracking: where its numbers go beside its folder.
        deepspeed: a ds_config file: ZeRO stage, communication, precision; never batch size, optimizer or schedule; one
            of the checkout's own (ds_configs/zero1.json) is found from any folder.
        out: the run's folder.
        seed: of sample order, draws, dropout and initialisation.
        resume: no = start anew; auto = go on from the newest complete checkpoint under `out`, if any.
        device: auto = CUDA where there is one, else the CPU.
        log_every_steps: optimizer steps between lines in metrics.jsonl and what `tracking` names.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    recommender: RecommenderConfig = field(default_factory=RecommenderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    deepspeed: Path = Path("ds_configs/zero0.json")
    out: Path = Path("runs/llara")
    seed: int = 0
    resume: Literal["no", "auto"] = "no"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every_steps: int = 1

    def __post_init__(self) -> None:
        _require(self.log_every_steps >= 1, f"log_every_steps={self.log_every_steps}: must be at least 1")

    def require_inputs(self) -> None:
        """Check that the three inputs are named.

        Raises:
            InputError: model.path, data.shards or recommender.path is not set; names all that are missing.
        """
        missing = [
            Finding("inputs", f"{name} is not set", f"give it in the --config file or as --{name}")
            for name, value in (
                ("model.path", self.model.path),
                ("data.shards", self.data.shards),
                ("recommender.path", self.recommender.path),
            )
            if str(value) in ("", ".")
        ]
        if missing:
            raise FindingsError(missing, "configuration")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values, nested as in the YAML; paths become strings, tuples lists."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return value

    return plain(config)


def run_config_from_dict(values: dict[str, Any]) -> RunConfig:
    """Rebuild a RunConfig from what `to_dict` made (a checkpoint's or a run's config).

    Raises:
        InputError: a field is unknown, or a value is out of range.
    """

    def build(kind: type, given: dict[str, Any], where: str) -> Any:
        fields = {item.name: item for item in dataclasses.fields(kind)}
        unknown = sorted(set(given) - set(fields))
        _require(not unknown, f"unknown configuration field {where}{unknown[0] if unknown else ''}")
        arguments: dict[str, Any] = {}
        for name, value in given.items():
            default = getattr(kind(), name)
            if dataclasses.is_dataclass(default):
                arguments[name] = build(type(default), value, f"{where}{name}.")
            elif isinstance(default, Path):
                arguments[name] = Path(value)
            elif isinstance(default, tuple):
                arguments[name] = tuple(value)
            else:
                arguments[name] = value
        return kind(**arguments)

    return build(RunConfig, values, "")
