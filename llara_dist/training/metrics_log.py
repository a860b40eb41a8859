"""What a run says of itself: metrics.jsonl, validation.jsonl, TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from llara_dist.console import say
from llara_dist.integrity import write_file
from llara_dist.training.scores import ValidationScores


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, oldest first; a last line cut short by a kill is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or "step" not in row:
            break
        rows.append(row)
    return rows


class MetricsLog:
    """Rank 0's log of one run; other ranks hold one that does nothing.

    Args:
        out: the run's folder.
        first_step: where this start begins; older lines of later steps are dropped, so that none is there twice.
        total_steps: T.
        enabled: whether this process writes.
        validated: the last step whose validation this start does not repeat.
    """

    def __init__(self, out: Path, first_step: int, total_steps: int, enabled: bool, validated: int = 0) -> None:
        self.enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        self._path = out / "metrics.jsonl"
        kept = [row for row in read_metrics(self._path) if row["step"] < first_step]
        write_file(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close())
        self._validations = out / "validation.jsonl"
        if self._validations.exists():
            done = [row for row in read_metrics(self._validations) if row["step"] <= validated]
            write_file(self._validations, "".join(json.dumps(row) + "\n" for row in done))
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step)
        self._complained = False
        self._last_line = 0.0
        self._total = total_steps
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.table import Column

            self._bar = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=10),
                TimeRemainingColumn(),
                # Wraps: every number is seen on a terminal of 80 columns as well.
                TextColumn("{task.description}", table_column=Column(ratio=1)),
                console=Console(stderr=True),
                expand=True,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=first_step)
            self._bar.start()

    def write(self, row: dict[str, Any]) -> None:
        """Log one step: a JSON line, TensorBoard scalars, and what a person sees.

        Args:
            row: `step` and numbers by name.
        """
        if not self.enabled:
            return
        with self._outliving_the_disk():
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(f"train/{name}", value, row["step"])
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        text = (
            f"loss {loss}  p {row['p']:.3f} (realised {row['hybrid_share']:.3f})  lr {row['lora_lr']:.2e}  "
            f"{row['samples_per_s']:.1f} samples/s  {row['tokens_per_s']:.0f} tokens/s  "
            f"padding {row['padding_share']:.1%}  {row['memory_mib']:.0f} MiB"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"] + 1, description=text)
        elif time.monotonic() - self._last_line > 5 or row["step"] + 1 == self._total:
            self._last_line = time.monotonic()
            print(f"step {row['step'] + 1}/{self._total}  {text}", flush=True)

    def write_validation(self, scores: ValidationScores, is_best: bool) -> None:
        """Log one validation: a line of validation.jsonl, TensorBoard scalars, a line for people."""
        if not self.enabled:
            return
        row = scores.to_dict() | {"best": is_best}
        with self._outliving_the_disk():
            with open(self._validations, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(f"validation/{name}", float(value), scores.step)
        valid = "" if scores.valid_ratio is None else f"  valid {scores.valid_ratio:.3f}"
        say(
            f"validation after step {scores.step}: HR@1 {scores.hit_ratio:.4f}{valid}  loss {scores.loss:.4f}  "
            f"{scores.rows} rows in {scores.seconds:.1f} s" + ("  (the best so far)" if is_best else "")
        )

    @contextlib.contextmanager
    def _outliving_the_disk(self) -> Iterator[None]:
        """A log that cannot be written is no reason to lose a run; the first time it is said."""
        try:
            yield
        except OSError as error:
            if not self._complained:
                say(f"{self._path}: the log cannot be written ({error.strerror or error}); the run goes on without")
            self._complained = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close everything."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.stop()
        with self._outliving_the_disk():
            self._file.close()
        with self._outliving_the_disk():
            self._board.close()
