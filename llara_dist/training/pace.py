"""How fast a run is lately, and the one line that says so; from rows of metrics.jsonl, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROWS = 20
"""Newest rows that a pace is taken over."""


@dataclass(frozen=True)
class Pace:
    """Speed over some rows, of the whole world as rank 0 sees it.

    Attributes:
        samples_per_s: samples ÷ seconds of waiting and computing.
        tokens_per_s: tokens ÷ the same.
        wait_share: of these seconds, the part that was waiting for data.
        mfu: model FLOPs ÷ what the GPU could have done while computing; None where its peak is not known.
        step_s: seconds a step, saving included.
    """

    samples_per_s: float
    tokens_per_s: float
    wait_share: float
    mfu: float | None
    step_s: float

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Pace:
        """Of rows as `step_metrics.py` makes them; at least one."""
        wait_s, work_s = (sum(row[name] for row in rows) for name in ("data_wait_s", "step_s"))
        whole_s = max(wait_s + work_s, 1e-9)
        rated = [row for row in rows if row["mfu"] is not None]
        rated_s = sum(row["step_s"] for row in rated)
        return cls(
            samples_per_s=sum(row["samples"] for row in rows) / whole_s,
            tokens_per_s=sum(row["tokens"] for row in rows) / whole_s,
            wait_share=wait_s / whole_s,
            mfu=sum(row["mfu"] * row["step_s"] for row in rated) / rated_s if rated_s > 0 else None,
            step_s=(whole_s + sum(row["saving_s"] for row in rows)) / len(rows),
        )

    def left_s(self, done: int, total_steps: int) -> float:
        """Seconds until all steps are done, validations not counted."""
        return max(0, total_steps - done) * self.step_s


def progress_line(row: Mapping[str, Any], pace: Pace, total_steps: int, short: bool = False) -> str:
    """What rank 0 says of a step, in one line.

    Args:
        row: of the step.
        pace: up to it.
        total_steps: T.
        short: fits into 80 columns, the place among the steps left out; what the largest numbers push out is memory.
    """
    done = row["step"] + 1
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    left = duration(pace.left_s(done, total_steps))
    if short:
        mfu = "" if pace.mfu is None else f" MFU {pace.mfu:.0%}"
        speed = f"{compact(pace.tokens_per_s)} tok/s wait {pace.wait_share:.1%}{mfu}"
        return f"loss {loss} p {row['p']:.3f} {speed} ETA {left} {row['memory_mib'] / 1024:.1f}G"
    mfu = "" if pace.mfu is None else f"  MFU {pace.mfu:.1%}"
    speed = f"{pace.tokens_per_s:,.0f} tokens/s  data wait {pace.wait_share:.1%}{mfu}"
    step = f"step {done:,}/{total_steps:,}"
    return f"{step}  loss {loss}  p {row['p']:.3f}  {speed}  {row['memory_mib']:,.0f} MiB  ETA {left}"


def compact(number: float) -> str:
    """Three digits or so: 950, 24.1k, 1.2M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: "0:00:07", "26:03:59"; from 100 hours on days and hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24}d {hours % 24}h" if hours >= 100 else f"{hours}:{minutes:02d}:{rest:02d}"
