"""Single-process debug mode: any config, made small and loud."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from llara_dist.config import RunConfig, TrackingConfig
from llara_dist.console import say, table
from llara_dist.data.tokenizer import load_tokenizer
from llara_dist.distributed import World
from llara_dist.errors import InputError
from llara_dist.stream.batch import Batch
from llara_dist.stream.loader import Step
from llara_dist.supervision.rank_logs import LOGS
from llara_dist.supervision.rank_status import RANKS
from llara_dist.training.engine import StepResult
from llara_dist.training.memory import peak_memory_mib

STEPS = 4
MARK = "debug"
"""The folder inside OUT-debug by which it is known as ours."""
SAMPLES = 8


def shrink(config: RunConfig, world: World) -> RunConfig:
    """The same run with few steps of few samples, read in this process, in a folder `OUT-debug` of its own.

    The folder is made anew each time (`clear`). Model, shards, recommender, curriculum, rates and ZeRO stage stay as
    they are; `fit_device` changes what has to be changed to fit one GPU.

    Raises:
        InputError: more than one process was started.
    """
    if world.size > 1:
        raise InputError(
            f"--debug runs in one process, {world.size} were started: use plain `llara-dist train --debug`"
        )
    return dataclasses.replace(
        config,
        out=debug_folder(config.out),
        resume="no",
        log_every_steps=1,
        data=dataclasses.replace(
            config.data,
            max_steps=min(STEPS, config.data.max_steps or STEPS),
            global_batch_samples=min(SAMPLES, config.data.global_batch_samples),
            workers=0,
        ),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=0),
        # Whoever looks at a team's project there does not want to see it.
        tracking=TrackingConfig(tensorboard=config.tracking.tensorboard),
        validation=dataclasses.replace(config.validation, rows=min(SAMPLES, config.validation.rows or SAMPLES)),
        # Whoever looks at a step with a debugger takes longer than a hang.
        faults=dataclasses.replace(config.faults, hang_timeout_s=1e6),
    )


def debug_folder(out: Path) -> Path:
    """Where the debug runs of the run in `out` write: the folder `OUT-debug` beside it."""
    resolved = Path(out).resolve()
    return resolved.with_name(resolved.name + "-debug")


def check_folder(out: Path) -> None:
    """Nothing that no debug run made lies in a debug run's folder.

    Raises:
        InputError: something does.
    """
    if out.exists() and not (out / MARK).is_dir() and _left_in(out):
        raise InputError(f"{out}: exists and was not made by --debug; remove it or choose another --out")


def clear(out: Path) -> None:
    """Remove what an earlier debug run left, and nothing else; to be called under the lock of `out`.

    What this run has made there to be watched stays.

    Raises:
        InputError: `out` is there and no debug run made it.
    """
    check_folder(out)
    for path in sorted(_left_in(out), key=lambda path: path.name == MARK):  # the mark last: it says whose the rest is
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _left_in(out: Path) -> list[Path]:
    """What lies in a folder but the run's lock and its ranks' signs of life and logs."""
    watched = (RANKS, LOGS)
    return [
        path for path in out.iterdir() if path.name not in watched and not path.name.startswith(("lock-", ".lock."))
    ]


def describe_sample(batch: Batch, index: int, tokenizer: object) -> tuple[str, list[str]]:
    """One sample of a batch as a person reads it.

    Args:
        batch: a packed row.
        index: which sample.
        tokenizer: the model's.

    Returns:
        The decoded tokens with each slot shown as ⟨item 42⟩, and one line a label: position, target token.
    """
    start, end = int(batch.cu_seqlens[index]), int(batch.cu_seqlens[index + 1])
    items = {
        int(position): int(batch.unique_items[inverse])
        for position, inverse in zip(batch.slot_positions.tolist(), batch.slot_inverse.tolist(), strict=True)
    }
    pieces: list[str] = []
    run: list[int] = []
    for position in range(start, end):
        if position in items:
            pieces += [_decode(tokenizer, run), f"⟨item {items[position]}⟩"]
            run = []
        else:
            run.append(int(batch.tokens[position]))
    pieces.append(_decode(tokenizer, run))
    labels = [
        f"position {int(p) - start} predicts {_decode(tokenizer, [int(label)])!r}"
        for p, label, sample in zip(batch.label_positions, batch.labels, batch.sample_of_label, strict=True)
        if int(sample) == index
    ]
    return "".join(pieces), labels


def _decode(tokenizer: object, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # pyright: ignore[reportAttributeAccessIssue]


def dump_batch(batch: Batch, path: Path) -> None:
    """Write a batch's tensors to a safetensors file."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        field.name: getattr(batch, field.name).contiguous()
        for field in dataclasses.fields(batch)
        if isinstance(getattr(batch, field.name), torch.Tensor)
    }
    save_file(tensors, path, metadata={"max_seqlen": str(batch.max_seqlen)})


class Debugger:
    """Looks at every step: shapes, a decoded sample, timing, memory, finite loss; anomaly detection is on.

    Its folder is cleared of an earlier debug run.

    Args:
        config: the shrunk run, whose folder is locked.
        device: of the run.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        clear(config.out)
        self._out = config.out / MARK
        self._out.mkdir(parents=True)
        self._device = device
        self._tokenizer = load_tokenizer(config.model.path, config.model.revision)
        self._shown: set[bool] = set()
        torch.autograd.set_detect_anomaly(True)
        torch.use_deterministic_algorithms(True, warn_only=True)

    def before(self, step: Step) -> None:
        """Show the step's micro-batches, the first text-only and the first hybrid sample; dump the first batch."""
        rows = [
            (i, len(b.keys), len(b.tokens), len(b.slot_positions), len(b.unique_items), len(b.labels), b.max_seqlen)
            for i, b in enumerate(step.microbatches)
        ]
        columns = ["micro-batch", "samples", "tokens", "slots", "distinct items", "labels", "longest"]
        table(f"step {step.index}: {step.samples} samples, {step.hybrid_samples} hybrid", columns, rows)
        for batch in step.microbatches:
            for index, hybrid in enumerate(batch.hybrid.tolist()):
                if hybrid not in self._shown:
                    self._shown.add(hybrid)
                    text, labels = describe_sample(batch, index, self._tokenizer)
                    form = "hybrid" if hybrid else "text-only"
                    say(f"sample key {int(batch.keys[index])} ({form}):\n{text}\nlabels:\n  " + "\n  ".join(labels))
        if step.index == 0:
            dump_batch(step.microbatches[0], self._out / "first_batch.safetensors")
            say(f"first batch written to {self._out / 'first_batch.safetensors'}")

    def after(self, step: Step, result: StepResult, seconds: float) -> None:
        """Show time, memory and loss; stop at a loss that is not finite.

        Raises:
            RuntimeError: the loss is not finite; names the step and the sample keys.
        """
        norm = "not reported" if result.grad_norm is None else f"{result.grad_norm:.4f}"
        say(
            f"step {step.index}: loss {result.loss:.6f}, gradient norm {norm}, {seconds:.3f} s, "
            f"{step.tokens / seconds:.0f} tokens/s, peak {peak_memory_mib(self._device):.0f} MiB"
        )
        if not torch.isfinite(torch.tensor(result.loss)):
            keys = [int(key) for batch in step.microbatches for key in batch.keys]
            raise RuntimeError(f"step {step.index}: loss is {result.loss}; sample keys {keys}")
