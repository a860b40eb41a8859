"""What a run says of itself: metrics.jsonl, validation.jsonl, trackers, a progress bar or plain lines."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from llara_dist.console import say
from llara_dist.errors import RequeueError
from llara_dist.integrity import write_file
from llara_dist.training.pace import ROWS, Pace, progress_line
from llara_dist.training.scores import ValidationScores
from llara_dist.training.trackers import Background, Ending, numbers_of


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
        tensorboard: whether event files are written to OUT/tensorboard.
        trackers: opens what else gets the rows, given those of earlier starts that stay in the log, by kind.
    """

    def __init__(
        self,
        out: Path,
        first_step: int,
        total_steps: int,
        enabled: bool,
        validated: int = 0,
        tensorboard: bool = True,
        trackers: Callable[[Mapping[str, Sequence[Mapping[str, Any]]]], Sequence[Background]] = lambda _: (),
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self._path, self._validations = out / "metrics.jsonl", out / "validation.jsonl"
        rows = [row for row in read_metrics(self._path) if row["step"] < first_step]
        validations = [row for row in read_metrics(self._validations) if row["step"] <= validated]
        write_file(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close())
        if self._validations.exists():
            write_file(self._validations, "".join(json.dumps(row) + "\n" for row in validations))
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step)
        self._trackers = trackers({"train": rows, "validation": validations})
        self._complained = False
        self._recent: deque[dict[str, Any]] = deque(maxlen=ROWS)
        self._last_line, self._unsaid = -math.inf, False
        self._total = total_steps
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
            from rich.table import Column

            self._bar = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=None, table_column=Column(ratio=1)),  # what the text leaves; on 80 columns nothing
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                console=Console(stderr=True),
                expand=True,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=first_step)
            self._bar.start()

    def write(self, row: dict[str, Any]) -> None:
        """Log one step: a JSON line, trackers, and what a person sees.

        Args:
            row: `step` and numbers by name, as `step_metrics.py` makes it.
        """
        if not self.enabled:
            return
        with self._outliving_the_disk():
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            self._track("train", row)
        self._recent.append(row)
        if self._bar is not None:
            text = progress_line(row, Pace.of(self._recent), self._total, short=True)
            self._bar.update(self._task, completed=row["step"] + 1, description=text)
            return
        self._unsaid = True
        if time.monotonic() - self._last_line > 5 or row["step"] + 1 == self._total:
            self._say_progress()

    def _say_progress(self) -> None:
        self._last_line, self._unsaid = time.monotonic(), False
        say(progress_line(self._recent[-1], Pace.of(self._recent), self._total))

    def _track(self, kind: str, row: Mapping[str, Any]) -> None:
        """Hand a row to TensorBoard and the trackers."""
        numbers = numbers_of(row)
        for tracker in self._trackers:
            tracker.log(kind, row["step"], numbers)
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(f"{kind}/{name}", float(value), row["step"])

    def write_validation(self, scores: ValidationScores, is_best: bool) -> None:
        """Log one validation: a line of validation.jsonl, trackers, a line for people."""
        if not self.enabled:
            return
        row = scores.to_dict() | {"best": is_best}
        with self._outliving_the_disk():
            with open(self._validations, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self._track("validation", row)
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

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close(Ending.FINISHED)
        else:
            self.close(Ending.KILLED if isinstance(error, RequeueError | KeyboardInterrupt) else Ending.FAILED)

    def close(self, ending: Ending = Ending.FINISHED) -> None:
        """Flush and close everything.

        Args:
            ending: of the run, for the trackers.
        """
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.stop()
        elif self._unsaid:
            self._say_progress()  # the run ends here, though steps may be left
        with self._outliving_the_disk():
            self._file.close()
        if self._board is not None:
            with self._outliving_the_disk():
                self._board.close()
        for tracker in self._trackers:
            tracker.close(ending)
